"""Two programs compared on the same inputs."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Outputs = Sequence[Any]


class Comparison:
    """The largest difference so far, and how often the first output agrees on the largest entry."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.parity, self.where = names, 0.0, "nowhere"
        self.same, self.rows = 0, 0

    def add(self, got: Outputs, want: Outputs) -> None:
        """Compare the outputs of one call."""
        for name, a, b in zip(self.names, got, want, strict=True):
            self._measure(name, np.asarray(a), np.asarray(b))
        a, b = np.asarray(got[0]), np.asarray(want[0])
        if b.dtype.kind == "f" and b.ndim and b.shape[-1] > 1 and a.shape == b.shape:
            same = np.argmax(a, -1) == np.argmax(b, -1)
            self.same, self.rows = self.same + int(same.sum()), self.rows + same.size

    def _measure(self, name: str, a: np.ndarray, b: np.ndarray) -> None:
        if a.shape != b.shape:
            self.parity = np.inf
            self.where = f"{name!r} of shape {list(a.shape)}, wanted {list(b.shape)}"
        if a.shape != b.shape or not b.size:
            return
        a, b = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(invalid="ignore"):
            gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        gap = np.where(np.isnan(gap), np.inf, gap)
        scale = np.max(np.abs(b), where=np.isfinite(b), initial=0.0) or 1.0
        place = np.unravel_index(int(np.argmax(gap)), gap.shape)
        if gap[place] / scale > self.parity:
            self.parity = float(gap[place] / scale)
            index = [int(i) for i in place]
            self.where = f"{name!r} at {index}: {a[place]:.6g} instead of {b[place]:.6g}"

    @property
    def agreement(self) -> float | None:
        return self.same / self.rows if self.rows else None

    def result(self) -> tuple[float, float | None]:
        """Give parity and agreement."""
        return self.parity, self.agreement


def compare(
    user: str, names: Sequence[str], pairs: Iterable[tuple[Outputs, Outputs]], tolerance: float
) -> tuple[float, float | None]:
    """Compare pairs of outputs; refuse those that are too far apart."""
    found = Comparison(names)
    for got, want in pairs:
        found.add(got, want)
    if not found.parity <= tolerance:
        raise ValueError(
            f"`export.{user}` made a file that differs from JAX by {found.parity:.2g} of the "
            f"largest value, more than `tolerance={tolerance:g}`: {found.where}. No file was "
            "written. Raise `tolerance` if the network is that sensitive (one in bfloat16 or "
            "float16: to 0.02), or compare its parts."
        )
    return found.result()
