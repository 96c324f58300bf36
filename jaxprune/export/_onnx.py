"""ONNX files, through jax2onnx."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._atomic import in_place
from jaxprune.export._carried import free_constants
from jaxprune.export._compare import compare
from jaxprune.export._culprits import culprits
from jaxprune.export._door import check_path
from jaxprune.export._extras import need
from jaxprune.export._fold import equations, fold
from jaxprune.export._moves import ease_moves
from jaxprune.export._plain import plain_products
from jaxprune.export._pools import free_pools
from jaxprune.export._products import is_known, is_narrow
from jaxprune.export._program import Program, cpu, draw, make_program, names, trials
from jaxprune.export._report import Report, describe
from jaxprune.export._session import Session, measure
from jaxprune.export._sizes import sized, symbols
from jaxprune.typing import Masks, Params

LIMIT = 2**31 - 2**20  # bytes of a protobuf message, with some room for all but the weights


def onnx(
    path: str | Path,
    fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    masks: Masks | None = None,
    batch: str | None = "batch",
    shapes: Any = None,
    opset: int = 20,
    latency: Sequence[int] = (1, 64),
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Report:
    """Write a function with its parameters as one ONNX file, weights inside.

    The function is traced and its program converted, whatever library it is written with; the small
    function of ``shrink`` is one like any other. So is the sparse one of ``compact``, whose file
    holds the kept blocks alone: a ``Gather`` and a ``MatMul`` for each product. What depends on no
    input is computed now, layers stacked under ``scan`` are written one by one, and batch
    normalisation goes into the weights of the product in front of it. The file is loaded by
    onnxruntime and compared with ``fn`` before it is put in place; an older file stays until then,
    and stays if something is wrong.

    Inputs are called ``input_0``, ``input_1``, those of trees by their paths as well
    (``input_0_tokens``); outputs ``output``, ``output_0`` in a tuple, ``output_logits`` in a dict.

    Args:
      path: where to write; a file that is there is replaced at once and whole.
      fn: function of params and inputs, also the small one of ``shrink`` and the sparse one of
        ``compact``.
      params: its parameters; they become part of the file.
      *inputs: examples, trees of arrays or of ``jax.ShapeDtypeStruct``. What is no array, such as
        a flag, is held fixed and is no input of the file.
      masks: baked in first, see ``bake``.
      batch: name of a first axis of any size, that of all inputs whose first axis is as long as
        the first input's; None for the shapes as given.
      shapes: names for axes of any size in place of ``batch``, in the words of
        ``jax.export.symbolic_args_specs``: ``"batch, time, ..."`` for all inputs, or a tuple with
        one for each; or what that returns, where sizes obey constraints. An input may also be a
        ``jax.ShapeDtypeStruct`` that has such names already.
      opset: version of the ONNX operators; from 21 on onnxruntime 1.32 quantizes some networks to
        files that it cannot load.
      latency: batch sizes to time; only the one of the examples where ``batch`` is None, and none
        if this is empty.
      tolerance: the largest difference from ``fn`` to allow, as a fraction of the largest value of
        an output.
      seed: of NumPy's generator for the inputs to compare on: normal floats, and integers within
        the range of the examples (zeros where they have no values). Two sizes of each axis of
        any size are tried, and the examples too.

    Returns:
      A ``Report``.

    Raises:
      ValueError: there are no inputs; ``fn`` needs to know the batch; an operation cannot be
        converted; the weights exceed the 2 GiB of one file; the file differs from ``fn``.
      TypeError: arguments in the wrong places, params without values, inputs that are keys or of
        types that the file cannot hold.
      ImportError: a package of the extra ``export`` is missing.

    Example:
      >>> import tempfile
      >>> import onnxruntime
      >>> folder = tempfile.TemporaryDirectory()
      >>> path = f"{folder.name}/double.onnx"
      >>> report = onnx(path, lambda p, x: p * x, jnp.array(2.0), jnp.ones((2, 3)))
      >>> session = onnxruntime.InferenceSession(path)
      >>> session.run(None, {"input_0": np.full((1, 3), 4.0, np.float32)}), report.parity
      ([array([[8., 8., 8.]], dtype=float32)], 0.0)
      >>> folder.cleanup()
    """
    check_path("onnx", path)
    need("jax2onnx", "onnx")
    size = sum(x.nbytes for x in jax.tree.leaves(params) if hasattr(x, "nbytes"))
    if size > LIMIT:
        raise ValueError(
            f"`export.onnx` got {size / 2**30:.3g} GiB of weights, but one ONNX file holds less "
            "than 2 GiB. Shrink more, or use `jp.export.stablehlo`."
        )
    program = make_program("onnx", fn, params, inputs, masks=masks, batch=batch, shapes=shapes)
    _check_types(program)
    labels = names(program.spec_tree, "input"), names(program.outputs, "output")
    with in_place(Path(path)) as written:
        with _named(program, opset):
            session = _write(written, program, opset, labels)
            got = [(session(values), values) for values in trials(program, seed)]
        pairs = ((outs, program.reference(*values)) for outs, values in got)
        with jax.default_device(cpu()):
            compared = compare("onnx", labels[1], pairs, tolerance)
        timed = measure(session, _batches(program, latency, seed)) if latency else None
        return describe(path, written, compared, timed)


def _check_types(program: Program) -> None:
    """Refuse types that NumPy lacks: onnxruntime takes and gives NumPy's."""
    for what, values in (
        ("an input", program.specs),
        ("a result", jax.tree.leaves(program.outputs)),
    ):
        narrow = [str(x.dtype) for x in values if is_narrow(x.dtype)]
        if narrow:
            raise TypeError(
                f"`export.onnx` got {what} of type {narrow[0]}, which onnxruntime neither takes "
                "nor gives in Python. Convert it inside of `fn`, from or to float32."
            )


def _write(
    written: Path, program: Program, opset: int, labels: tuple[list[str], list[str]]
) -> Session:
    """Write the file and load it."""

    def convert(*xs: Any) -> tuple[Any, ...]:
        _show_names(xs)
        return _apart(fold(program.closed, *xs), xs)

    written.write_bytes(_to_onnx(convert, program.specs, opset, *labels))
    return Session(written, "onnx")


@contextlib.contextmanager
def _named(program: Program, opset: int) -> Iterator[None]:
    """Name the operations that stand in the way of a file, or of running it."""
    try:
        yield
    except Exception as error:
        attempt = lambda fn, specs: _alone(fn, specs, opset)  # noqa: E731
        jaxpr = program.closed.jaxpr
        named = _complex(jaxpr) or culprits(jaxpr, attempt, error)
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        several = any(name != program.batch for name in program.sizes)
        raise ValueError(
            f"`export.onnx` cannot convert {named}: {type(error).__name__}: {reason} Write it with "
            "operations that ONNX has, keep that part out of `fn`, or use `jp.export.stablehlo`, "
            "which knows all of JAX."
            + " Where strides divide an axis of any size, call it `8*h`."
            * several
        ) from error


def _complex(jaxpr: Any) -> str:
    """Name the first operation that makes complex numbers, if there is one."""
    for eqn, line in equations(jaxpr):
        if any(getattr(v.aval, "dtype", np.dtype(bool)).kind == "c" for v in eqn.outvars):
            where = line or "an unknown line"
            return f"`{eqn.primitive.name}` at {where}, which makes complex numbers"
    return ""


def _alone(fn: Callable[..., Any], specs: Sequence[Any], opset: int) -> None:
    """Convert one operation, and run it."""
    closed = jax.make_jaxpr(fn)(*specs)
    session = Session(_to_onnx(lambda *xs: fold(closed, *xs), specs, opset), "onnx")
    shapes = sized(specs, dict.fromkeys(symbols(specs), 2))
    session([np.ones(shape, x.dtype) for shape, x in zip(shapes, specs, strict=True)])


def _to_onnx(
    fn: Callable[..., Any],
    specs: Sequence[Any],
    opset: int,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
) -> bytes:
    """Convert in memory: weights of a file that is written twice would be appended."""
    jax2onnx = need("jax2onnx", "onnx")
    with _contained():
        model = jax2onnx.to_onnx(
            fn,
            inputs=list(specs),
            model_name="jaxprune",
            opset=opset,
            input_names=inputs,
            output_names=outputs,
        )
    free_pools(model)
    free_constants(model)
    plain_products(model)
    ease_moves(model)
    del model.graph.value_info[:]  # shapes in between: runtimes infer them, and some are wrong
    need("onnx.checker", "onnx").check_model(model)
    return bytes(model.SerializeToString())


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Keep back what the packages below say to those who develop them, and what they leave behind.

    The converter puts a ``jnp.cumsum`` of its own in the place of JAX's, for good, which takes no
    axis by position.
    """
    logger = logging.getLogger("onnx_ir")
    level, functions = logger.level, dict(vars(jnp))
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        for name, function in functions.items():
            if getattr(jnp, name, None) is not function:
                setattr(jnp, name, function)


def _show_names(inputs: Sequence[Any]) -> None:
    """Take every 8th entry of an axis of size ``8*h``: jax2onnx finds ``h`` on axes alone."""
    for x in inputs:
        for axis, size in enumerate(x.shape):
            times, _, name = str(size).partition("*")
            if times.isdigit() and name.isidentifier():
                lax.slice_in_dim(x, 0, size, int(times), axis=axis)


def _apart(outs: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Copy results that are an input, a constant or another result: each has its own name."""
    found: list[Any] = []
    for out in outs:
        taken = is_known(out) or any(out is other for other in (*inputs, *found))
        found.append(jnp.copy(out) if taken else out)
    return tuple(found)


def _batches(
    program: Program, latency: Sequence[int], seed: int
) -> dict[int, Sequence[np.ndarray]]:
    rng = np.random.default_rng(seed)
    if program.batch is None:
        values = draw(program, rng, program.sizes)
        return {values[0].shape[0] if values[0].shape else 1: values}
    return {n: draw(program, rng, {**program.sizes, program.batch: n}) for n in latency}
