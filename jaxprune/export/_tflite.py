"""LiteRT files whose fully connected weights are stored by what is not zero."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune._advice import PruneWarning
from jaxprune._atomic import in_place
from jaxprune.export._compare import Comparison
from jaxprune.export._door import check_path, check_share, check_tolerance, is_whole
from jaxprune.export._extras import need
from jaxprune.export._report import Report, describe
from jaxprune.export._session import in_turns
from jaxprune.export._sparse_weights import (
    WIDTH,
    Table,
    Weight,
    find_weights,
    parse,
    read_weights,
    serialize,
    signatures,
    store,
    tabulate,
)

TABLE = 128  # bytes that describe a table, about
WORTH = {1: 0.95, WIDTH: 0.9}  # zeros that it takes to be about as fast as dense, by width


def sparsify_tflite(
    path: str | Path,
    source: str | Path,
    *,
    block: tuple[int, int] | None = None,
    compute: str = "auto",
    min_sparsity: float = 0.0,
    latency: Sequence[int] = (1,),
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Report:
    """Store the fully connected weights of a ``.tflite`` by what is not zero.

    The schema of LiteRT files (once TensorFlow Lite) has a table for sparse weights that no
    converter writes any more and the runtime still reads. Each float32 matrix `[outputs, inputs]`
    is stored by single weights, by blocks of 1 x 4 (``Blocks((4, 1))`` of an `[inputs, outputs]`
    kernel), or left dense, whichever has the fewest bytes. Then it is multiplied as it is, or
    unpacked once when the file is loaded. The file is loaded by the runtime and compared with the
    source before it is put in place, each of its signatures. What no signature runs, as bodies of
    loops, stays dense.

    What to expect of ai-edge-litert 2.3.0, one layer on one thread of an x86 CPU, beside dense
    weights under XNNPACK (``python -m benchmarks.tflite``; time of 1 row, of 16). Unpacked weights
    have the bytes below and take the time of dense ones, 0.9 to 1.15, at all sparsities.

    - [512, 256] at 90 %: blocks 0.11 of the bytes, 0.75 and 1.0 of the time; single weights 0.13 of
      the bytes, 2.2 and 3.1 of the time.
    - [1024, 1024] at 90 %: blocks 0.11, 0.2 and 0.7; single weights 0.15, 0.7 and 2.4.
    - [512, 256] at 50 %: blocks 0.54, 3.0 and 4.2; single weights 0.63, 11 and 17.

    The file tells of layers that multiply sparse weights by version 8 of their operator. That
    matters: without it XNNPACK, which the runtime uses by default, takes them for dense, reads past
    their end and crashes, or computes nonsense. Weights in int8 stay as they are, since the runtime
    multiplies them in blocks of 1 x 16 only (others give wrong values), and so do those in float16,
    which the file widens at first.

    Args:
      path: where to write; a file that is there is replaced at once and whole.
      source: the dense file, whatever made it; it may be the same path. Its weights have zeros:
        export what ``bake`` gives.
      block: ``(1, 4)`` or ``(1, 1)`` for these alone; None for the smaller of both.
      compute: ``"sparse"`` multiplies weights as they are stored, ``"dense"`` unpacks them when the
        file is loaded; ``"auto"`` unpacks all but blocks of 1 x 4 with 90 % zeros or more, the only
        ones that are about as fast in layers of all sizes.
      min_sparsity: matrices with a smaller share of zeros stay dense.
      latency: batch sizes to time, in turns with the source; only that of the file if it is fixed,
        none if this is empty.
      tolerance: the largest difference from the source to allow, as a fraction of the largest value
        of an output. The runtime adds up in another order: 4e-7 for 256 inputs, 2e-6 for 4,096.
      seed: of NumPy's generator for the inputs to compare on: normal floats, and zeros for
        integers, which may be indices.

    Returns:
      A ``Report`` of the new file, with parity between it and the source, and bytes and latency of
      both.

    Raises:
      ValueError: no ``.tflite``; no weights that can be sparse, with the reason for each; none that
        would take less room; the file differs from the source.
      TypeError: arguments in the wrong places.
      FileNotFoundError: there is no ``source``.
      ImportError: a package of the extra ``litert`` is missing.

    Warns:
      PruneWarning: the file is slower than the source, and matrices that are multiplied as they are
        stored have fewer than 90 % zeros (95 % by single weights).

    Example:
      >>> import tempfile
      >>> import flatbuffers
      >>> from ai_edge_litert import schema_py_generated as s
      >>> w = np.where(np.arange(4096).reshape(64, 64) % 40 < 4, 1, 0).astype(np.float32)
      >>> shapes = [[1, 64], [64, 64], [1, 64]]  # a source made by hand: x, w, and their product
      >>> tensors = [s.TensorT(shape=shape, buffer=i) for i, shape in enumerate(shapes)]
      >>> layers = [s.OperatorT(inputs=[0, 1], outputs=[2])]
      >>> graph = s.SubGraphT(tensors=tensors, operators=layers, inputs=[0], outputs=[2])
      >>> buffers = [s.BufferT(), s.BufferT(data=w.view(np.uint8).ravel()), s.BufferT()]
      >>> codes = [s.OperatorCodeT(deprecatedBuiltinCode=9, builtinCode=9)]
      >>> model = s.ModelT(version=3, operatorCodes=codes, subgraphs=[graph], buffers=buffers)
      >>> builder, folder = flatbuffers.Builder(0), tempfile.TemporaryDirectory()
      >>> end = builder.Finish(model.Pack(builder), b"TFL3")
      >>> source, path = Path(folder.name) / "dense.tflite", Path(folder.name) / "sparse.tflite"
      >>> size = source.write_bytes(builder.Output())
      >>> report = sparsify_tflite(path, source)
      >>> report.bytes < 0.15 * size, report.zeros_kept, report.parity < 1e-6
      (True, 1.0, True)
      >>> folder.cleanup()
    """
    check_path("sparsify_tflite", path)
    check_path("sparsify_tflite", source, "source")
    _check_settings(block, compute, min_sparsity, tolerance)
    _check_latency(latency)
    dense, model = _read(Path(source))
    chosen = _choose(model, block, min_sparsity, source)
    sparse_ones = [pair for pair in chosen if _stays(*pair, compute)]
    for weight, table in chosen:
        store(model, weight, table, unpack=not _stays(weight, table, compute))
    with in_place(Path(path)) as written:
        written.write_bytes(serialize(model))
        sparse = written.read_bytes()
        others = [key for key, graph in signatures(model).items() if graph]
        compared = _compare(dense, sparse, others, tolerance, seed)
        kept, zeroed = _read_back(sparse, [weight for weight, _ in chosen])
        timed, before = _time(dense, sparse, latency, seed)
        report = describe(path, written, compared, timed or None)
    _warn(sparse_ones, timed, before)
    return dataclasses.replace(
        report,
        zeros_kept=kept,
        zeroed=zeroed,
        dense_bytes=len(dense),
        dense_latency_ms=before or None,
    )


def _stays(weight: Weight, table: Table, compute: str) -> bool:
    """Tell whether a matrix is to be multiplied as it is stored."""
    enough = table.values.shape[1] == WIDTH and round(weight.zeros, 2) >= WORTH[WIDTH]
    return compute == "sparse" or (compute == "auto" and enough)


def _check_settings(block: Any, compute: Any, min_sparsity: Any, tolerance: Any) -> None:
    pair = isinstance(block, Sequence | np.ndarray) and tuple(block) in ((1, 1), (1, WIDTH))
    if block is not None and not pair:
        raise ValueError(
            f"`export.sparsify_tflite(block={block!r})` is none that the runtime computes with. "
            f"Use (1, {WIDTH}), (1, 1), or None for the smaller of both."
        )
    if compute not in ("auto", "sparse", "dense"):
        raise ValueError(
            f"`export.sparsify_tflite(compute={compute!r})` is unknown. Use 'sparse', 'dense', or "
            "'auto' for the faster of both."
        )
    check_share("sparsify_tflite", min_sparsity)
    check_tolerance("sparsify_tflite", tolerance)


def _check_latency(latency: Any) -> None:
    many = isinstance(latency, Sequence | np.ndarray) and not isinstance(latency, str)
    if not many or not all(is_whole(n) and n > 0 for n in latency):
        raise ValueError(
            f"`export.sparsify_tflite(latency={latency!r})` is no sequence of batch sizes. Use one "
            "such as (1,) or (1, 64), and () for none."
        )


def _read(source: Path) -> tuple[bytes, Any]:
    """Read a file, and make sure that the runtime takes it."""
    if not source.is_file():
        raise FileNotFoundError(
            f"`export.sparsify_tflite` finds no file {str(source)!r}. The path of the new file "
            "comes first, that of the source second."
        )
    need("ai_edge_litert.interpreter", "sparsify_tflite", "litert")
    data = source.read_bytes()
    try:
        model = parse(data)
        _Runtime(data)
    except Exception as error:
        raise ValueError(
            f"`export.sparsify_tflite` cannot load {str(source)!r}: {error}. Pass a `.tflite` that "
            "LiteRT runs."
        ) from error
    return data, model


def _choose(
    model: Any, block: tuple[int, int] | None, min_sparsity: float, source: str | Path
) -> list[tuple[Weight, Table]]:
    """Choose a table for each matrix that becomes smaller by one."""
    weights, others = find_weights(model)
    chosen = []
    for weight in weights:
        widths = (1, WIDTH) if block is None else (block[1],)
        tables = [tabulate(weight.dense, n) for n in widths if weight.dense.shape[1] % n == 0]
        table = min(tables, key=lambda table: table.nbytes, default=None)
        if weight.zeros < min_sparsity:
            others[weight.name] = f"has {weight.zeros:.0%} zeros, less than {min_sparsity:.0%}"
        elif table is None:
            others[weight.name] = f"has {weight.dense.shape[1]} inputs, no multiple of {WIDTH}"
        elif table.nbytes + TABLE >= weight.dense.nbytes:
            others[weight.name] = f"has {weight.zeros:.0%} zeros and would be no smaller"
        else:
            chosen.append((weight, table))
    if chosen:
        return chosen
    if not others:
        raise ValueError(
            f"`export.sparsify_tflite` finds no fully connected layer in {str(source)!r}, and "
            "sparse weights go with those only. Cut whole channels with `jp.shrink` instead."
        )
    listed = "".join(f"\n- {name!r} {why}" for name, why in others.items())
    raise ValueError(
        f"`export.sparsify_tflite` finds no weights in {str(source)!r} to store sparse:{listed}\n"
        "Export a float32 network with `jp.export.bake(params, masks)`, of half zeros or more."
    )


class _Runtime:
    """A file in LiteRT's interpreter as it is by default, with XNNPACK, on one thread."""

    def __init__(self, data: bytes, batch: int | None = None) -> None:
        runtime = need("ai_edge_litert.interpreter", "sparsify_tflite", "litert")
        self._interpreter = runtime.Interpreter(model_content=data, num_threads=1)
        self.batch = 1
        for i, known in enumerate(self._interpreter.get_input_details()):
            shape = [int(n) for n in known["shape"]]
            free = [int(n) for n in known["shape_signature"][:1]] == [-1]
            if free and batch is not None:
                shape[0] = batch
                self._interpreter.resize_tensor_input(known["index"], shape)
            if i == 0:
                self.free, self.batch = free, (shape or [1])[0]
        self._interpreter.allocate_tensors()
        self.inputs = self._interpreter.get_input_details()
        self._outputs = self._interpreter.get_output_details()
        self.names = [out["name"] for out in self._outputs]
        self.invoke = self._interpreter.invoke

    def __call__(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.set(values)
        self.invoke()
        return [self._interpreter.get_tensor(out["index"]) for out in self._outputs]

    def set(self, values: Sequence[np.ndarray]) -> None:
        for known, value in zip(self.inputs, values, strict=True):
            self._interpreter.set_tensor(known["index"], value)

    def draw(self, rng: np.random.Generator) -> list[np.ndarray]:
        return [_draw(known, rng) for known in self.inputs]


def _draw(known: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Normal floats, 8 bit numbers of any value, and zeros where numbers may be indices."""
    shape, kind = known["shape"], np.dtype(known["dtype"])
    if kind.kind == "f":
        return np.asarray(rng.standard_normal(shape)).astype(kind)
    byte = kind.kind in "iu" and kind.itemsize == 1
    return np.asarray(rng.integers(0, 128, shape) if byte else np.zeros(shape)).astype(kind)


def _compare(
    dense: bytes, sparse: bytes, others: Sequence[str], tolerance: float, seed: int
) -> tuple[float, float | None]:
    """Compare the new file with the source, at two sizes of the batch where it may have any.

    Signatures of other subgraphs than the first, which is what an interpreter runs by itself, are
    compared at the sizes that they have.
    """
    rng, first = np.random.default_rng(seed), Comparison(_Runtime(dense).names)
    for batch in (None, 3):
        ours, theirs = _Runtime(sparse, batch), _Runtime(dense, batch)
        values = theirs.draw(rng)
        first.add(ours(values), theirs(values))
    found = [first, *(_compare_signature(dense, sparse, key, rng) for key in others)]
    worst = max(found, key=lambda comparison: comparison.parity)
    if not worst.parity <= tolerance:
        raise ValueError(
            f"`export.sparsify_tflite` made a file that differs from the source by "
            f"{worst.parity:.2g} of the largest value, more than `tolerance={tolerance:g}`: "
            f"{worst.where}. No file was written. Raise `tolerance` if the network is that "
            "sensitive, or `min_sparsity`, so that fewer matrices are sparse."
        )
    return worst.parity, first.agreement


def _compare_signature(
    dense: bytes, sparse: bytes, key: str, rng: np.random.Generator
) -> Comparison:
    runtime = need("ai_edge_litert.interpreter", "sparsify_tflite", "litert")
    ours, theirs = (
        runtime.Interpreter(model_content=data, num_threads=1).get_signature_runner(key)
        for data in (sparse, dense)
    )
    values = {name: _draw(known, rng) for name, known in theirs.get_input_details().items()}
    got, want = ours(**values), theirs(**values)
    found = Comparison([f"{key}/{name}" for name in want])
    found.add([got[name] for name in want], list(want.values()))
    return found


def _read_back(sparse: bytes, weights: Sequence[Weight]) -> tuple[float, int]:
    """Count the zeros of the source that are still some, and the new ones."""
    model, zeros, kept, new = parse(sparse), 0, 0, 0
    for weight in weights:
        now = read_weights(model, weight.graph, weight.tensor) == 0
        before = weight.dense == 0
        zeros, kept = zeros + int(before.sum()), kept + int((before & now).sum())
        new += int((now & ~before).sum())
    return kept / zeros, new


def _time(
    dense: bytes, sparse: bytes, latency: Sequence[int], seed: int
) -> tuple[dict[int, float], dict[int, float]]:
    """Milliseconds of a call by batch size: of the new file, and of the source."""
    rng, calls = np.random.default_rng(seed), {}
    for batch in latency if _Runtime(dense).free else latency[:1]:
        for data in (sparse, dense):
            run = _Runtime(data, batch)
            run.set(run.draw(rng))
            calls[run.batch, data is dense] = run.invoke
    taken = in_turns(calls)
    ours, theirs = ({n: t for (n, old), t in taken.items() if old == w} for w in (False, True))
    return ours, theirs


def _warn(
    chosen: Sequence[tuple[Weight, Table]],
    timed: Mapping[int, float],
    before: Mapping[int, float],
) -> None:
    """Say that sparse weights do not pay, if they do not."""
    widths = [(weight, table.values.shape[1]) for weight, table in chosen]
    few = [
        f"{w.name!r} ({w.zeros:.1%}, 1 x {n})" for w, n in widths if round(w.zeros, 2) < WORTH[n]
    ]
    slower = [f"{timed[n] / before[n]:.2g} at batch {n}" for n in timed if timed[n] > before[n]]
    if few and (slower or not timed):
        measured = f"Milliseconds over those of the source: {', '.join(slower)}. " if slower else ""
        warnings.warn(
            "`export.sparsify_tflite` stored weights with so few zeros that LiteRT mostly "
            f"computes more slowly than with dense ones: {', '.join(few)}. {measured}It takes "
            f"{WORTH[WIDTH]:.0%} in blocks of 1 x {WIDTH} (`jp.patterns.Blocks(({WIDTH}, 1))`), "
            f"{WORTH[1]:.0%} of single weights; `compute='auto'` unpacks the others.",
            PruneWarning,
            stacklevel=3,
        )
