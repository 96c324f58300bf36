"""Packages for Core ML, with sparse weights, through StableHLO and coremltools."""

import contextlib
import dataclasses
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune._advice import PruneWarning
from jaxprune._atomic import in_place
from jaxprune._tree import list_paths
from jaxprune.export._bake import bake
from jaxprune.export._compare import compare
from jaxprune.export._constants import Constants, Found, compare_constants
from jaxprune.export._coreml_door import (
    check_batch,
    check_inputs,
    check_package,
    check_settings,
    matrices,
)
from jaxprune.export._culprits import culprits
from jaxprune.export._extras import need
from jaxprune.export._fold import fold
from jaxprune.export._mil import infer, to_model
from jaxprune.export._program import Program, cpu, draw, make_program, names
from jaxprune.export._report import Report, describe, sizes_in
from jaxprune.typing import Masks, Params

SMALL = 512  # entries: the table of a smaller sparse matrix is larger than what it saves


def coreml(
    path: str | Path,
    fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    masks: Masks | None = None,
    palettize: int | None = None,
    precision: str = "float16",
    min_sparsity: float = 0.5,
    batch: str | None = None,
    max_batch: int = 64,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Report:
    """Write a function with its parameters as a Core ML package with sparse weights.

    Matrices with enough zeros are stored as a bit for each weight and the values that are left;
    with ``palettize`` these are rounded to a few values on top. What depends on no input is
    computed now, layers stacked under ``scan`` are written one by one, and batch normalisation goes
    into the weights of the product in front of it. The package is for iOS 18, macOS 15 and later.

    **What is verified, and what is not**: Core ML runs on Apple's systems only, so nothing here
    runs the package; compare outputs on the device. Before weights are rounded and compressed, the
    program is computed by coremltools' own inference of constants and compared with ``fn``, as far
    as that goes: products, elementwise functions, sums, softmax and norms, no convolution and no
    pooling. Then the package is saved and loaded again from disk; its weights, decompressed, are
    compared with those before, and these with the params, each found by its values however it is
    transposed. Only then it is put in place; an older one stays until then, and stays if something
    is wrong.

    Inputs are called ``input_0``, ``input_1``, those of trees by their paths as well
    (``input_0_tokens``); outputs ``output``, ``output_0`` in a tuple, ``output_logits`` in a dict.
    What is no letter or digit of ASCII becomes ``_`` in names.

    Args:
      path: where to write, a name that ends in ``.mlpackage``; packages are folders. One that is
        there is replaced whole.
      fn: function of params and inputs, also the small one of ``shrink``.
      params: its parameters; they become part of the package.
      *inputs: examples, trees of arrays or of ``jax.ShapeDtypeStruct``. What is no array, such as
        a flag, is held fixed and is no input of the package.
      masks: baked in first, see ``bake``.
      palettize: bits of a palette, 1, 2, 3, 4, 6 or 8, for matrices of more than 2,048 weights:
        their values become the means of 2 ** bits clusters. The zeros of matrices that are stored
        sparse stay zeros, those of others do not.
      precision: ``"float16"``, which the Neural Engine computes in, or ``"float32"``, for weights
        and arithmetic.
      min_sparsity: matrices with a smaller share of zeros stay dense.
      batch: name of a first axis of any size, that of all inputs whose first axis is as long as the
        first input's; None for the shapes as given, which Core ML runs on more of its hardware.
      max_batch: the largest size of that axis, which Core ML wants to know; that of the examples
        if it is larger.
      tolerance: the largest difference from ``fn`` to allow, as a fraction of the largest value of
        an output, where the program can be computed.
      seed: of NumPy's generator for the inputs to compare on: normal floats, and integers within
        the range of the examples (zeros where they have no values).

    Returns:
      A ``Report`` of the package, without latency. Its parity compares weights, not outputs: the
      largest difference as a fraction of the largest value of the matrix, at most 5e-4 for float16
      alone, which is also what it is where weights are merged with others before they are rounded.
      ``dense_bytes`` are those of the package before weights became sparse.

    Raises:
      ValueError: another suffix, or a folder that is no package; an operation that cannot be
        converted, or a type (bfloat16 is none of Core ML's); the program differs from ``fn``;
        weights that are no numbers, or beyond the range of float16; a palette that Core ML does not
        have; an example without entries.
      TypeError: arguments in the wrong places, params without values, inputs that are keys.
      ImportError: a package of the extra ``coreml`` is missing (there is no coremltools for Python
        3.14), or scikit-learn for palettes.

    Warns:
      PruneWarning: removed weights are not zero in the package; or params that have zeros are no
        constants of it, since ``fn`` merges, slices or ignores them.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> folder = tempfile.TemporaryDirectory()
      >>> w = jnp.where(jnp.arange(16384) % 10 == 0, jnp.sin(jnp.arange(16384.0)), 0)
      >>> params, path = {"w": w.reshape(128, 128)}, f"{folder.name}/net.mlpackage"
      >>> report = coreml(path, lambda p, x: x @ p["w"], params, jnp.ones((1, 128)))
      >>> report.zeros_kept, report.parity < 5e-4, report.bytes < 0.4 * report.dense_bytes
      (1.0, True, True)
      >>> folder.cleanup()

    References:
      `Apple's guide to pruning
      <https://apple.github.io/coremltools/docs-guides/source/opt-pruning-overview.html>`_.
    """
    check_package("coreml", path)
    check_settings(palettize, precision, min_sparsity, tolerance)
    check_batch(batch, max_batch)
    check_inputs(inputs)
    with _contained():
        need("coremltools", "coreml", "coreml")
        need("stablehlo_coreml", "coreml", "coreml")
        if palettize is not None:
            need("sklearn.cluster", "coreml(palettize=...)", "coreml")
    program = make_program("coreml", fn, params, inputs, masks=masks, batch=batch, shapes=None)
    baked = params if masks is None else bake(params, masks)
    weights = matrices(baked, precision)
    with in_place(Path(path)) as written, _contained():
        model = _convert_or_tell(program, precision, _most(program, max_batch))
        _compare(program, tolerance, seed)
        dense, before = _constants(model), _size(model)
        _check_palettes(dense, palettize)
        _named(program, _compress(model, palettize, min_sparsity)).save(str(written))
        found = compare_constants(weights, dense, _follow(dense, _read(written)))
        report = describe(path, written, (found.parity, None))
    _warn(path, found)
    return dataclasses.replace(
        report, zeros_kept=found.zeros_kept, zeroed=found.zeroed, dense_bytes=before
    )


def _warn(path: str | Path, found: Found) -> None:
    """Tell of zeros that are lost, and of those that cannot be told apart."""
    if found.zeros_kept is not None and found.zeros_kept < 1:
        warnings.warn(
            f"`export.coreml` kept {found.zeros_kept:.2%} of the zeros in {str(path)!r}; the "
            "others are small numbers there. Pass a smaller `min_sparsity`: palettes keep the "
            "zeros of matrices that are stored sparse, and of no others.",
            PruneWarning,
            stacklevel=3,
        )
    if found.missing:
        warnings.warn(
            f"`export.coreml` finds no matrix like {list_paths(list(found.missing))} in "
            f"{str(path)!r}: merged with others, cut to pieces, or unused. Zeros are counted over "
            "all constants of the program. Look at the report, and let `fn` multiply with each "
            "param as it is if its zeros have to be told.",
            PruneWarning,
            stacklevel=3,
        )


def _most(program: Program, max_batch: int) -> int:
    """The largest size of the batch: no example is beyond it."""
    pairs = zip(program.specs, program.given, strict=True)
    free = [x.shape[0] for spec, x in pairs if spec.shape and not isinstance(spec.shape[0], int)]
    return max([max_batch, *(n for n in free if isinstance(n, int))])


def _convert_or_tell(program: Program, precision: str, max_batch: int) -> Any:
    """Convert, or name the operations that stand in the way."""
    convert = lambda fn, specs: to_model(fn, specs, precision, max_batch)  # noqa: E731
    try:
        return convert(lambda *xs: fold(program.closed, *xs), program.specs)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "").rstrip(".")
        raise ValueError(
            f"`export.coreml` cannot convert {culprits(program.closed.jaxpr, convert, error)}: "
            f"{type(error).__name__}: {reason}. {_advice(program, error)}"
        ) from error


def _advice(program: Program, error: Exception) -> str:
    if "bf16" in str(error):
        return (
            "Core ML has no bfloat16: build the model with `dtype=jnp.float32` for the export, "
            "cast its params, and pass inputs in float32."
        )
    words = "Write it with operations that Core ML has, or keep that part out of `fn`."
    return f"{words} Or pass `batch=None`." if program.sizes else words


def _compare(program: Program, tolerance: float, seed: int) -> None:
    """Compare what can be computed of the program with the function."""
    labels = names(program.outputs, "output")
    values = draw(program, np.random.default_rng(seed), program.sizes)
    try:
        results = infer(program, values)
    except Exception:  # an operation that goes with unknown values only: then nobody knows
        return
    known = [i for i, got in enumerate(results) if got is not None]
    if known:
        with jax.default_device(cpu()):
            wanted = program.reference(*values)
        pair = [results[i] for i in known], [wanted[i] for i in known]
        compare("coreml", [labels[i] for i in known], [pair], tolerance)


def _check_palettes(dense: Constants, palettize: int | None) -> None:
    """Refuse constants that no mean is made of."""
    infinite = [name for name, x in dense.items() if x.size > SMALL and not np.isfinite(x).all()]
    if palettize is not None and infinite:
        raise ValueError(
            f"`export.coreml(palettize={palettize})` cannot round {list_paths(infinite)}, "
            "constants of the program with infinite entries, such as "
            f"{list(dense[infinite[0]].shape)} of a mask. Let `fn` compute them from an input, "
            "or use -1e4 in place of infinity: float16 ends at 65504."
        )


def _named(program: Program, model: Any) -> Any:
    """Give inputs and outputs the names that our other files have."""
    ct = need("coremltools", "coreml", "coreml")
    spec = model.get_spec()
    given, made = spec.description.input, spec.description.output
    wanted = _labels(program.spec_tree, "input"), _labels(program.outputs, "output")
    # By way of names that nothing has: `input_1` may be what the first one is called now.
    for turn in ("jaxprune_{}", "{}"):
        for feature, name in zip(given, wanted[0], strict=True):
            ct.utils.rename_feature(spec, feature.name, turn.format(name), rename_outputs=False)
        for feature, name in zip(made, wanted[1], strict=True):
            ct.utils.rename_feature(spec, feature.name, turn.format(name), rename_inputs=False)
    return ct.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True)


def _labels(tree: Any, prefix: str) -> list[str]:
    """Name leaves by their paths, in letters and digits, which is all that Core ML takes."""
    found = [re.sub(r"[^A-Za-z0-9_]", "_", name) for name in names(tree, prefix)]
    twice = len(set(found)) < len(found)
    return [f"{prefix}_{i}" for i in range(len(found))] if twice else found


def _compress(model: Any, palettize: int | None, min_sparsity: float) -> Any:
    """Store what is not zero, and round that to a palette."""
    tools = need("coremltools.optimize.coreml", "coreml", "coreml")
    prune = tools.OpThresholdPrunerConfig(
        threshold=0.0, minimum_sparsity_percentile=float(min_sparsity), weight_threshold=SMALL
    )
    sparse = tools.prune_weights(model, tools.OptimizationConfig(global_config=prune))
    if palettize is None:
        return sparse
    config = tools.OpPalettizerConfig(mode="kmeans", nbits=palettize)
    # Without `joint_compression` what is sparse already would be passed over, without a word.
    return tools.palettize_weights(
        sparse, tools.OptimizationConfig(global_config=config), joint_compression=True
    )


def _read(path: Path) -> Constants:
    """Read the weights of a package, decompressed."""
    ct = need("coremltools", "coreml", "coreml")
    tools = need("coremltools.optimize.coreml", "coreml", "coreml")
    return _constants(tools.decompress_weights(ct.models.MLModel(str(path), skip_model_load=True)))


def _constants(model: Any) -> Constants:
    """List the constants of a program that may be weights, by their names."""
    found = {}
    for function in model._mil_program.functions.values():
        for op in _operations(function):
            value = op.outputs[0].val if op.op_type == "const" else None
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size > 1:
                found[op.name] = value
    return found


def _operations(block: Any) -> Iterator[Any]:
    """List what a program computes, also inside of loops and branches."""
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _operations(inner)


def _follow(dense: Constants, back: Constants) -> Constants:
    """Give constants the names that they had before they were compressed."""
    ends = ("", "_sparsified", "_palettized", "_sparsified_palettized")
    found = {n: back[n + end] for n in dense for end in ends if n + end in back}
    lost = [name for name in dense if name not in found]
    if lost:
        raise ValueError(
            f"`export.coreml` cannot read {list_paths(lost)} back, constants of the program, and "
            "knows nothing of their zeros. No file was written. Pass `min_sparsity=1.0` and no "
            "`palettize`, which leaves weights as they are, and report the function."
        )
    return found


def _size(model: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/dense.mlpackage")
        return sum(sizes_in(Path(folder) / "dense.mlpackage").values())


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Keep back what coremltools says to those on a Mac, and its bars of progress."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
