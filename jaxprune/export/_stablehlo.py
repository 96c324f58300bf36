"""Programs for XLA: StableHLO with the weights inside."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.extend import core

from jaxprune._atomic import in_place
from jaxprune.export._compare import compare
from jaxprune.export._culprits import culprits
from jaxprune.export._door import check_path
from jaxprune.export._extras import need
from jaxprune.export._program import Program, cpu, make_program, names, trials
from jaxprune.export._report import Report, describe
from jaxprune.typing import Masks, Params


def stablehlo(
    path: str | Path,
    fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    masks: Masks | None = None,
    batch: str | None = "batch",
    shapes: Any = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Report:
    """Write a function with its parameters as one file that JAX loads anywhere.

    ``jax.export.deserialize(bytearray(Path(path).read_bytes())).call(*inputs)`` runs it, without
    the code that made it. The file is loaded and compared with ``fn`` on this machine's CPU before
    it is put in place; an older file stays until then, and stays if something is wrong.

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
      platforms: what it is compiled for; ``"cpu"`` has to be among them.
      tolerance: the largest difference from ``fn`` to allow, as a fraction of the largest value of
        an output.
      seed: of NumPy's generator for the inputs to compare on: normal floats, and integers within
        the range of the examples (zeros where they have no values). Two sizes of each axis of
        any size are tried, and the examples too.

    Returns:
      A ``Report`` without latency.

    Raises:
      ValueError: there are no inputs; ``fn`` needs to know the batch; an operation cannot be
        exported; the file differs from ``fn``.
      TypeError: arguments in the wrong places, params without values, inputs that are keys.
      ImportError: ``flatbuffers`` is missing.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> folder = tempfile.TemporaryDirectory()
      >>> path = f"{folder.name}/double.stablehlo"
      >>> report = stablehlo(path, lambda p, x: p * x, jnp.array(2.0), jnp.ones((2, 3)))
      >>> loaded = jax.export.deserialize(bytearray(report.path.read_bytes()))
      >>> loaded.call(jnp.full((1, 3), 4.0)), report.parity
      (Array([[8., 8., 8.]], dtype=float32), 0.0)
      >>> folder.cleanup()
    """
    check_path("stablehlo", path)
    need("flatbuffers", "stablehlo")
    if "cpu" not in platforms:
        raise ValueError(
            f"`export.stablehlo(platforms={tuple(platforms)})` could not be compared with `fn` "
            "here. Add 'cpu'; the file runs on all of the platforms."
        )
    program = make_program("stablehlo", fn, params, inputs, masks=masks, batch=batch, shapes=shapes)
    data = _serialize(program, tuple(platforms))
    with in_place(Path(path)) as written:
        written.write_bytes(data)
        exported: Any = jax.export.deserialize(bytearray(written.read_bytes()))
        structure = jax.tree.structure(program.spec_tree)
        pairs = (
            (
                jax.tree.leaves(exported.call(*jax.tree.unflatten(structure, values))),
                program.reference(*values),
            )
            for values in trials(program, seed)
        )
        with jax.default_device(cpu()):
            compared = compare("stablehlo", names(program.outputs, "output"), pairs, tolerance)
        return describe(path, written, compared)


def _serialize(program: Program, platforms: tuple[str, ...]) -> bytes:
    run, structure = core.jaxpr_as_fun(program.closed), jax.tree.structure(program.outputs)

    def call(*trees: Any) -> Any:
        return jax.tree.unflatten(structure, run(*jax.tree.leaves(trees)))

    def attempt(fn: Callable[..., Any], specs: Sequence[Any]) -> bytes:
        exported: Any = jax.export.export(jax.jit(fn), platforms=platforms)(*specs)
        return bytes(exported.serialize())

    try:
        return attempt(call, program.spec_tree)
    except Exception as error:
        raise ValueError(
            f"`export.stablehlo` cannot write {culprits(program.closed.jaxpr, attempt, error)} for "
            f"{', '.join(platforms)}: {type(error).__name__}: {error}. Keep that part out of `fn`, "
            "write it with other operations, or choose fewer `platforms`."
        ) from error
