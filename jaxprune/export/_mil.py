"""Programs of Core ML made from functions, and computed as far as coremltools computes them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxprune.export._extras import need
from jaxprune.export._fold import fold
from jaxprune.export._program import Program, cpu


def to_mil(fn: Callable[..., Any], specs: Sequence[Any]) -> Any:
    """Make a program of a function, through StableHLO."""
    ct = need("coremltools", "coreml", "coreml")
    bridge = need("stablehlo_coreml", "coreml", "coreml")

    jitted = jax.jit(fn, keep_unused=True)
    exported: Any = jax.export.export(jitted, platforms=["cpu"])(*specs)
    # A module of any program knows the dialects that this one is written in.
    known: Any = jax.jit(lambda x: x).lower(0.0).compiler_ir("stablehlo")
    module = type(known).parse(exported.mlir_module(), context=known.context)
    return bridge.convert(module, minimum_deployment_target=ct.target.iOS18)


def to_model(fn: Callable[..., Any], specs: Sequence[Any], precision: str, max_batch: int) -> Any:
    """Make a model of a function: its program, optimised, with arithmetic as it will be."""
    ct = need("coremltools", "coreml", "coreml")
    bridge = need("stablehlo_coreml", "coreml", "coreml")

    with _own_symbols():
        program = to_mil(fn, specs)
        free = any(not isinstance(n, int) for x in specs for n in x.shape)
        given = program.functions[program.default_function_name].inputs
        # An input that nothing reads is dropped, unless all are listed.
        listed = free or not all(x.child_ops for x in given.values())
        return ct.convert(
            program,
            source="milinternal",
            inputs=_ranges(ct, given, specs, max_batch) if listed else None,
            minimum_deployment_target=ct.target.iOS18,
            pass_pipeline=bridge.build_pass_pipeline(),
            compute_precision=ct.precision[precision.upper()],
            skip_model_load=True,
        )


@contextlib.contextmanager
def _own_symbols() -> Iterator[None]:
    """Forget the names of sizes, before and after: a conversion that fails leaves them taken.

    coremltools keeps them for the whole process and clears them where one succeeds.
    """
    used = need("coremltools.converters.mil.mil.types.symbolic", "coreml", "coreml").k_used_symbols
    used.clear()
    try:
        yield
    finally:
        used.clear()


def _ranges(ct: Any, given: Any, specs: Sequence[Any], most: int) -> list[Any]:
    """Say which sizes an axis of any size may have."""
    size = lambda n: n if isinstance(n, int) else ct.RangeDim(1, most, 1)  # noqa: E731
    return [
        ct.TensorType(name=name, shape=[size(n) for n in x.shape], dtype=x.dtype.type)
        for name, x in zip(given, specs, strict=True)
    ]


def infer(program: Program, values: Sequence[np.ndarray]) -> list[np.ndarray | None]:
    """Compute the results for given inputs, without a Mac; None for those that are not known.

    Where all inputs of an operation are constants, coremltools works out its result, to fold it.
    So the program is made once more, with the inputs as constants. It knows products, elementwise
    functions, sums and moves of axes, and no convolution and no pooling.
    """
    with jax.default_device(cpu()):
        closed = jax.make_jaxpr(program.reference)(*values)
        # In two steps: known inputs would be folded away in the first.
        folded = jax.make_jaxpr(lambda *xs: fold(closed, *xs))(*values)
        given = [jax.numpy.asarray(value) for value in values]
        made = to_mil(lambda: core.jaxpr_as_fun(folded)(*given), [])
    results = [out.val for out in made.functions[made.default_function_name].outputs]
    shapes = [x.aval for x in folded.jaxpr.outvars]
    return [
        None if got is None else np.asarray(got).reshape(want.shape)
        for got, want in zip(results, shapes, strict=True)
    ]
