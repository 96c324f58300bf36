"""Which products are computed from blocks, which from whole weights, and why: a table."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune._compact import evaluate, paths_of, trace
from jaxprune._compaction import Compaction, Only, bytes_of, compaction_of, cost_of
from jaxprune._report import in_bytes
from jaxprune._tree import leaves_by_path
from jaxprune.graph._network import check_call
from jaxprune.graph._sparse import Seen
from jaxprune.typing import Masks, Params


class PlanRow(NamedTuple):
    """A weight that masks cover.

    Attributes:
      path: of the weight.
      shape: of the weight.
      blocks: inputs and outputs of a block; None where it stays as it is.
      kept: blocks that each column keeps, and of how many; None likewise.
      bytes: of the kept blocks and their indices, or of the weight as it is.
      dense_bytes: of the weight.
      time: estimated time of its product, as a fraction of that of the whole weight.
      products: what it multiplies, one text a use.
      whole: where the whole weight is read besides, which makes it first.
      why: why it stays as it is.
    """

    path: str
    shape: tuple[int, ...]
    blocks: tuple[int, int] | None
    kept: tuple[int, int] | None
    bytes: int
    dense_bytes: int
    time: float
    products: tuple[str, ...]
    whole: tuple[str, ...]
    why: str


@dataclasses.dataclass(frozen=True)
class CompactPlan:
    """What ``compact`` does with each weight; print it.

    Attributes:
      rows: one a weight that masks cover, in order of the params.
    """

    rows: tuple[PlanRow, ...]

    @property
    def compacted(self) -> tuple[str, ...]:
        """Paths of the weights that are held by blocks."""
        return tuple(row.path for row in self.rows if row.blocks is not None)

    def __str__(self) -> str:
        head = ("path", "shape", "blocks", "kept", "bytes", "of", "time", "product")
        cells = [head, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in cells]
        lines = [line.rstrip() for line in lines]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], *self._notes()])

    def _notes(self) -> list[str]:
        notes = [f"dense: {row.path!r}: {row.why}" for row in self.rows if row.why]
        for row in self.rows:
            notes += [f"made whole: {row.path!r}: {at} reads it" for at in row.whole]
            if row.blocks and not row.products and not row.whole:
                notes.append(f"never read: {row.path!r}")
        return notes


def _cells(row: PlanRow) -> tuple[str, ...]:
    pair = lambda x, sep: "" if x is None else sep.join(map(str, x))  # noqa: E731
    return (
        row.path or "(root)",
        "x".join(map(str, row.shape)),
        pair(row.blocks, "x"),
        pair(row.kept, " / "),
        in_bytes(row.bytes),
        in_bytes(row.dense_bytes),
        f"{row.time:.2f}" if row.products or not row.blocks else "-",
        "; ".join(row.products) or "none" if row.blocks else "dense",
    )


def compact_plan(
    fn: Callable[..., Any],
    params: Params,
    masks: Masks,
    *inputs: Any,
    only: Only = None,
    **keywords: Any,
) -> CompactPlan:
    """Say what ``compact`` does with each weight, and why.

    Nothing is computed: ``fn`` is traced and evaluated on shapes, as the sparse function is.

    Args:
      fn: function of params and inputs.
      params: the params.
      masks: masks, as for ``compact``.
      *inputs: inputs of ``fn``, arrays or ``jax.ShapeDtypeStruct``.
      only: as for ``compact``.
      **keywords: keyword arguments of ``fn``.

    Returns:
      A ``CompactPlan``: printed, a table of weights with their blocks, bytes, the estimated time
      of a product as a fraction of that of the whole weight, and all products that there are.

    Raises:
      TypeError, ValueError: as for ``compact``.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((512, 512)), "v": jnp.ones((512, 8))}
      >>> masks = {"w": jnp.kron(jnp.eye(4), jnp.ones((128, 128))) > 0, "v": None}
      >>> mlp = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
      >>> print(compact_plan(mlp, params, masks, jnp.ones((16, 512))))
      path  shape    blocks   kept   bytes     of      time  product
      --------------------------------------------------------------------------
      w     512x512  128x128  1 / 4  262.2 kB  1.0 MB  0.64  dot, 16 x 512 x 512
    """
    check_call(fn, keywords, compact_plan)
    found = compaction_of(params, masks, only, "compact_plan")
    program = trace(fn, found, inputs, keywords)
    paths = paths_of(found)
    specs = list(program.specs)
    for number, path in enumerate(paths):
        if (form := found.forms.get(path)) is not None:
            specs[number] = jax.ShapeDtypeStruct(form.shape, specs[number].dtype)
    seen: list[Seen] = []
    jax.eval_shape(lambda *arrays: evaluate(program, found, arrays, seen), *specs)
    leaves = dict(zip(paths, program.specs, strict=False))
    numbers = {path: number for number, path in enumerate(paths)}
    covered = leaves_by_path(masks, "compact_plan")
    rows = [
        _row(found, path, leaves[path], [s for s in seen if numbers[path] in s.leaves])
        for path in paths
        if path in covered
    ]
    return CompactPlan(tuple(rows))


def _row(found: Compaction, path: str, leaf: Any, seen: Sequence[Seen]) -> PlanRow:
    form = found.forms.get(path)
    size = leaf.size * jnp.dtype(leaf.dtype).itemsize
    if form is None:
        why = found.dense.get(path, "")
        return PlanRow(path, leaf.shape, None, None, size, size, 1.0, (), (), why)
    products = dict.fromkeys(str(s.met) for s in seen if s.met is not None)
    whole = dict.fromkeys(s.at for s in seen if s.met is None)
    small = bytes_of(form, leaf.dtype)
    return PlanRow(
        path,
        leaf.shape,
        form.block,
        form.kept,
        small,
        size,
        cost_of(form),
        tuple(products),
        tuple(whole),
        "",
    )
