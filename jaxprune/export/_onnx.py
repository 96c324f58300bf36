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

from jaxprune._types import Masks, Params
from jaxprune.export._biases import merge_biases
from jaxprune.export._compare import compare
from jaxprune.export._culprits import culprits
from jaxprune.export._extras import need
from jaxprune.export._fold import fold, is_known
from jaxprune.export._pools import free_pools
from jaxprune.export._program import Program, cpu, draw, make_program, names, trials
from jaxprune.export._report import Report, describe, in_place
from jaxprune.export._session import Session, measure

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
    function of ``shrink`` is one like any other. What depends on no input is computed now, and
    batch normalisation goes into the weights of the product in front of it. The file is loaded by
    onnxruntime and compared with ``fn`` before it is put in place; an older file stays until then,
    and stays if something is wrong.

    Inputs are called ``input_0``, ``input_1``, those of trees by their paths as well
    (``input_0_tokens``); outputs ``output``, ``output_0`` in a tuple, ``output_logits`` in a dict.

    Args:
      path: where to write; a file that is there is replaced at once and whole.
      fn: function of params and inputs, also the small one of ``shrink``.
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
      TypeError: params without values, inputs that are keys.
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
    need("jax2onnx", "onnx")
    size = sum(x.nbytes for x in jax.tree.leaves(params) if hasattr(x, "nbytes"))
    if size > LIMIT:
        raise ValueError(
            f"`export.onnx` got {size / 2**30:.3g} GiB of weights, but one ONNX file holds less "
            "than 2 GiB. Shrink more, or use `jp.export.stablehlo`."
        )
    program = make_program("onnx", fn, params, inputs, masks=masks, batch=batch, shapes=shapes)
    labels = names(program.spec_tree, "input"), names(program.outputs, "output")
    with in_place(path) as written:
        with _named(program, opset):
            session = _write(written, program, opset, labels)
            got = [(session(values), values) for values in trials(program, seed)]
        pairs = ((outs, program.reference(*values)) for outs, values in got)
        with jax.default_device(cpu()):
            compared = compare("onnx", labels[1], pairs, tolerance)
        timed = measure(session, _batches(program, latency, seed)) if latency else None
        return describe(path, written, compared, timed)


def _write(
    written: Path, program: Program, opset: int, labels: tuple[list[str], list[str]]
) -> Session:
    """Write the file and load it."""
    convert = lambda *xs: _apart(fold(program.closed, *xs), xs)  # noqa: E731
    written.write_bytes(_to_onnx(convert, program.specs, opset, *labels))
    return Session(written, "onnx")


@contextlib.contextmanager
def _named(program: Program, opset: int) -> Iterator[None]:
    """Name the operations that stand in the way of a file, or of running it."""
    try:
        yield
    except Exception as error:
        attempt = lambda fn, specs: _alone(fn, specs, opset)  # noqa: E731
        raise ValueError(
            f"`export.onnx` cannot convert {culprits(program.closed.jaxpr, attempt, error)}: "
            f"{type(error).__name__}: {error}. Write it with operations that ONNX has, keep that "
            "part out of `fn`, or use `jp.export.stablehlo`, which knows all of JAX."
        ) from error


def _alone(fn: Callable[..., Any], specs: Sequence[Any], opset: int) -> None:
    """Convert one operation, and run it where its shapes are known."""
    closed = jax.make_jaxpr(fn)(*specs)
    session = Session(_to_onnx(lambda *xs: fold(closed, *xs), specs, opset), "onnx")
    if all(isinstance(n, int) for x in specs for n in x.shape):
        session([np.ones(x.shape, x.dtype) for x in specs])


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
    merge_biases(model)
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
