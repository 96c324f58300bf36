"""What an exported file is like."""

import dataclasses
import gzip
from collections.abc import Mapping
from pathlib import Path

LARGE = 2**27  # bytes; the weights of language models are far larger
PIECES, PIECE = 32, 2**20


@dataclasses.dataclass(frozen=True)
class Report:
    """An exported file in figures; print it.

    Attributes:
      path: the file, or the folder of a package.
      bytes: its size, that of all files in a folder.
      gzip_bytes: its size once compressed, where zeros take no room; beyond 128 MiB an estimate
        from pieces of the file.
      parity: the largest difference from what it was made of, as a fraction of the largest value
        of the same output.
      agreement: the fraction of top-1 predictions (largest entry along the last axis of the first
        output) that both agree on; None where the first output is no row of scores.
      latency_ms: milliseconds of a call by batch size, under onnxruntime or LiteRT with one thread,
        the median of interleaved repeats; None for what neither of them runs.
      zeros_kept: the share of removed weights that are exactly 0 in the file, read back from it;
        None where nothing was removed, or nothing is known of it.
      zeroed: how many of the kept weights became 0, as rounding does to small ones.
      dense_bytes: the size of such a file with every weight written out, where a file is made
        sparse; None elsewhere.
      dense_latency_ms: as ``latency_ms``, of that file, in turns with the sparse one.
    """

    path: Path
    bytes: int
    gzip_bytes: int
    parity: float
    agreement: float | None = None
    latency_ms: Mapping[int, float] | None = None
    zeros_kept: float | None = None
    zeroed: int | None = None
    dense_bytes: int | None = None
    dense_latency_ms: Mapping[int, float] | None = None

    def __str__(self) -> str:
        rows = [("file", str(self.path)), ("bytes", f"{self.bytes:,}")]
        if self.dense_bytes is not None:
            rows.append(("of dense", f"{self.bytes / self.dense_bytes:.2%}"))
        rows += [("gzipped", f"{self.gzip_bytes:,}"), ("parity", f"{self.parity:.1e}")]
        if self.agreement is not None:
            rows.append(("agreement", f"{self.agreement:.2%}"))
        for batch, taken in (self.latency_ms or {}).items():
            dense = (self.dense_latency_ms or {}).get(batch)
            beside = f" (dense {dense:.3f} ms)" if dense is not None else ""
            rows.append((f"batch {batch}", f"{taken:.3f} ms{beside}"))
        if self.zeros_kept is not None:
            rows.append(("zeros kept", f"{self.zeros_kept:.2%}"))
        if self.zeroed is not None:
            rows.append(("kept, now 0", f"{self.zeroed:,}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def describe(
    path: str | Path,
    written: Path,
    compared: tuple[float, float | None],
    latency: Mapping | None = None,
) -> Report:
    """Report what has been written; ``path`` is where it is going to be."""
    parity, agreement = compared
    sizes = sizes_in(written)
    packed = sum(_gzip_size(file, size) for file, size in sizes.items())
    return Report(Path(path), sum(sizes.values()), packed, parity, agreement, latency)


def sizes_in(path: Path) -> dict[Path, int]:
    """The bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {file: file.stat().st_size for file in files if file.is_file()}


def _gzip_size(path: Path, size: int) -> int:
    """Compress a file; of a large one, which would take minutes, pieces that lie evenly in it."""
    with path.open("rb") as file:
        if size <= LARGE:
            return len(gzip.compress(file.read(), mtime=0))
        packed = 0
        for i in range(PIECES):
            file.seek(i * (size - PIECE) // (PIECES - 1))
            packed += len(gzip.compress(file.read(PIECE), mtime=0))
    return round(packed * size / (PIECES * PIECE))
