"""Which indices live and die together: classes, products of classes, and why some cannot die."""

# Ids are nodes of a forest (union-find): a class of ids dies together, and its root, the lowest id
# of the class, speaks for it. That is enough for channels, but not for axes that are laid out along
# one another. Where 12 channels are read as 3 heads of 4 parts,
#
#     rows:     h0   h1   h2
#     columns:  p0   p1   p2   p3
#     cells:    c0 c1 c2 ... c11        c7 = (h1, p3)
#
# a channel is alive where its head and its part both are, and what may be removed one by one, the
# units, are the 3 + 4 roots that are no cell: c7 has the units h1 and p3. Cells may be rows or
# columns of other products, as of (batch, head, part).
#
# `solve` draws the conclusions from products. Each adds to what is known and takes nothing back, so
# that it comes to an end:
#
#   - a cell that cannot die holds its row and its column, as it would go with either;
#   - a row that cannot die decides nothing, so that its cells are the columns: they are joined;
#   - cells that are equal have equal rows and columns, if they are split in the same way. 24 = 2 x
#     12 and 24 = 6 x 4 fit one another as 2 x 3 x 4; 24 = 3 x 8 and 24 = 4 x 6 do not: all stay;
#   - a cell that is its own row says nothing about rows: its columns must not die.

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Ids = np.ndarray  # int64; one id for each index along an axis
Why = str | Callable[[], str]  # a reason, or what finds it out where it is needed


class Grid(NamedTuple):
    """``cells[p, q]`` is alive where ``rows[p]`` and ``columns[q]`` both are."""

    cells: np.ndarray
    rows: np.ndarray
    columns: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)


class Coupling:
    """Ids with three relations, each of them only ever added to.

    ``join`` says that ids die together, ``freeze`` that they cannot die, ``product`` that some are
    alive where two others are. ``solve`` draws the conclusions. All of it works on whole arrays: a
    large network has millions of ids, and all indices of an axis are treated alike.
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1024, np.int64)  # a forest; the root of a class is its lowest id
        self._frozen = np.zeros(1024, np.int32)  # of a root: number of the reason, 0 for none
        self._inexact = np.zeros(1024, np.int32)
        self._read = np.zeros(1024, np.int32)
        self._axis = np.zeros(1024, np.int32)  # which ids were made together
        self._size = self._axes = 0
        self._reasons: dict[str, int] = {"": 0}
        self._grids: list[Grid] = []
        self._factors: tuple[np.ndarray, np.ndarray] | None = None
        self._changes = 0

    def fresh(self, n: int) -> Ids:
        """Make ids for an axis that nothing is known of."""
        start, self._size = self._size, self._size + n
        if self._size > len(self._parent):
            room = max(self._size, 2 * len(self._parent)) - len(self._parent)
            for name in ("_parent", "_frozen", "_inexact", "_read", "_axis"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros(room, old.dtype)]))
        ids = np.arange(start, self._size)
        self._parent[ids] = ids
        self._axis[ids] = self._axes
        self._axes += 1
        return ids

    @property
    def size(self) -> int:
        """How many ids there are."""
        return self._size

    def find(self, ids: Ids) -> Ids:
        """Give the root of each id."""
        roots = self._parent[ids]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                self._parent[ids] = roots
                return roots
            roots = above

    def join(self, a: Ids, b: Ids) -> None:
        """Let ``a[i]`` and ``b[i]`` die together."""
        if a is b:
            return
        while True:
            a, b = self.find(a), self.find(b)
            differ = a != b
            if not differ.any():
                return
            self._changes += 1
            low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            self._parent[high] = low
            # Where `high` names a root twice one of the two wins: the other pair is found to differ
            # in the next round. What is a root no more hands on what has been said of it.
            for reason in (self._frozen, self._inexact, self._read):
                told = high[reason[high] > 0]
                reason[self.find(told)] = reason[told]  # where several meet, one of them is kept
            a, b = a[differ], b[differ]

    def freeze(self, ids: Ids, why: Why) -> None:
        """Say that none of the ids can die."""
        self._mark(self._frozen, ids, why)

    def blur(self, ids: Ids, why: Why) -> None:
        """Say that removing an id does not equal setting its parameters to zero."""
        self._mark(self._inexact, ids, why)

    def read(self, ids: Ids) -> None:
        """Say that data is summed over the ids."""
        self._mark(self._read, ids, "read")

    def product(self, cells: Ids, rows: Ids, columns: Ids) -> None:
        """Let ``cells`` `[rows * columns]` be alive where their row and their column are."""
        self._grids.append(Grid(cells.reshape(len(rows), len(columns)), rows, columns))

    def frozen(self, ids: Ids) -> np.ndarray:
        """Tell which of the ids cannot die."""
        return self._frozen[self.find(ids)] > 0

    def is_read(self, ids: Ids) -> np.ndarray:
        """Tell over which of the ids data is summed."""
        return self._read[self.find(ids)] > 0

    def why_frozen(self, ids: Ids) -> str:
        """Give the first reason why some of the ids cannot die."""
        return self._first(self._frozen, ids)

    def why_inexact(self, ids: Ids) -> str:
        """Give the first reason why some of the ids are not exact."""
        return self._first(self._inexact, ids)

    def solve(self) -> None:
        """Draw the conclusions from all products until nothing changes any more."""
        changes = -1
        while changes != self._changes:
            changes = self._changes
            for grid in self._grids:
                self._settle(grid)
            self._reconcile()
        self._factors = self._find_factors()

    def units(self, ids: Ids) -> tuple[np.ndarray, np.ndarray]:
        """List pairs of a position in ``ids`` and a unit (a root) that takes it along if it dies.

        Ids that cannot die have no unit, cells of products have several.
        """
        rows, columns = self._products()
        position, root = np.arange(len(ids)), self.find(ids)
        found = []
        while len(root):  # a cell is replaced by its row and its column, until none is left
            free = self._frozen[root] == 0
            position, root = position[free], root[free]
            cell = rows[root] >= 0
            found.append((position[~cell], root[~cell]))
            position = np.concatenate([position[cell], position[cell]])
            root = np.concatenate([rows[root[cell]], columns[root[cell]]])
            root = self.find(root)
        if not found:
            return np.zeros(0, int), np.zeros(0, int)
        position, root = (np.concatenate(x) for x in zip(*found, strict=True))
        if len(found) > 1:  # one number a pair sorts much faster than pairs do
            position, root = np.divmod(np.unique(position * self._size + root), self._size)
        return position, root

    def alive(self, dead: Ids) -> np.ndarray:
        """Say of every root `[ids]` whether it is alive once the units ``dead`` are gone."""
        rows, columns = self._products()
        alive = np.ones(self._size, bool)
        alive[dead] = False
        cells = np.nonzero(rows >= 0)[0]
        while True:
            new = alive[cells] & alive[self.find(rows[cells])] & alive[self.find(columns[cells])]
            if np.array_equal(new, alive[cells]):
                return alive
            alive[cells] = new

    def kinds(self) -> np.ndarray:
        """Number the roots by kind: of one kind are those that lie along the same axes.

        Axes are joined as wholes here, if any of their ids are: a second, smaller coupling.
        """
        kinds = Coupling()
        kinds.fresh(self._axes)
        ids = np.arange(self._size)
        roots = self.find(ids)
        kinds.join(self._axis[ids].astype(np.int64), self._axis[roots].astype(np.int64))
        return kinds.find(self._axis[roots].astype(np.int64))

    def _mark(self, reasons: np.ndarray, ids: Ids, why: Why) -> None:
        roots = self.find(ids)
        new = roots[reasons[roots] == 0]
        if len(new):
            reason = why if isinstance(why, str) else why()
            reasons[new] = self._reasons.setdefault(reason, len(self._reasons))
            self._changes += 1

    def _first(self, reasons: np.ndarray, ids: Ids) -> str:
        numbers = reasons[self.find(ids)]
        return list(self._reasons)[int(numbers[np.argmax(numbers > 0)])] if len(numbers) else ""

    def _settle(self, grid: Grid) -> None:
        """Draw the conclusions from one product."""
        cells, rows, columns = (self.find(x) for x in grid)
        stuck = self._frozen[cells] > 0
        if stuck.any():
            why = self.why_frozen(cells[stuck])
            self.freeze(rows[stuck.any(1)], why)
            self.freeze(columns[stuck.any(0)], why)
        vague = self._inexact[cells] > 0
        if vague.any():
            why = self.why_inexact(cells[vague])
            self.blur(rows[vague.any(1)], why)
            self.blur(columns[vague.any(0)], why)
        needed = self._read[cells] > 0
        if needed.any():
            self.read(rows[needed.any(1)])
            self.read(columns[needed.any(0)])
        for ids in (rows, columns):
            if len(ids) and (ids == ids[0]).all():  # or removing it would leave nothing
                self.freeze(ids[:1], "every index of an axis would go with it")
        for factor, other, across in ((rows, columns, cells), (columns, rows, cells.T)):
            held = self._frozen[factor] > 0
            if held.any():  # what cannot die decides nothing: the cells are the other factor
                self.join(across[held].ravel(), np.tile(other, held.sum()))
            own = (across == factor[:, None]) & ~held[:, None]
            if own.any():  # the cell is its own factor, so that the other must not matter
                self.freeze(other[own.any(0)], "it would take a part of its own axis along")

    def _reconcile(self) -> None:
        """Find cells that are equal and let their factors be equal, too.

        Equal cells stand beside one another once all cells are sorted by root, so that comparing
        neighbours is enough: equality is passed on along the row.
        """
        open_ = [
            (i, p, q)
            for i, grid in enumerate(self._grids)
            for p, q in [(self.frozen(grid.rows), self.frozen(grid.columns))]
            if not (p.all() or q.all())
        ]
        if not open_:
            return
        parts = []
        for i, p, q in open_:
            grid = self._grids[i]
            free = ~(p[:, None] | q[None, :])
            at, to = np.nonzero(free)
            parts.append((grid.cells[free], grid.rows[at], grid.columns[to], np.full(len(at), i)))
        cells, rows, columns, number = (np.concatenate(x) for x in zip(*parts, strict=True))
        roots = self.find(cells)
        order = np.argsort(roots, kind="stable")
        first, second = order[:-1], order[1:]
        equal = roots[first] == roots[second]
        first, second = first[equal], second[equal]
        shapes = np.array([grid.shape for grid in self._grids])
        fits = (shapes[number[first]] == shapes[number[second]]).all(1)
        self.join(rows[first[fits]], rows[second[fits]])
        self.join(columns[first[fits]], columns[second[fits]])
        pairs = np.stack([number[first[~fits]], number[second[~fits]]], 1)
        gone = set()
        for i, j in np.unique(pairs, axis=0):
            if i not in gone and j not in gone:
                both = (number[first] == i) & (number[second] == j) & ~fits
                gone |= self._nest(int(i), int(j), cells[first[both]])
        self._grids = [grid for i, grid in enumerate(self._grids) if i not in gone]

    def _nest(self, i: int, j: int, shared: Ids) -> set[int]:
        """Split an axis that is split in two ways into three factors, if one split holds both."""
        a, b = sorted((self._grids[i], self._grids[j]), key=lambda grid: grid.shape[0])
        (p1, q1), (p2, q2) = a.shape, b.shape
        same = p1 * q1 == p2 * q2
        same = same and np.array_equal(self.find(a.cells.ravel()), self.find(b.cells.ravel()))
        self._changes += 1
        if not same or p2 % p1:
            self.freeze(shared, "an axis is split in two ways that do not fit one another")
            return set()
        middle = self.fresh(p2 // p1)
        self.product(b.rows, a.rows, middle)
        self.product(a.columns, middle, b.columns)
        return {i if self._grids[i] is b else j}

    def _products(self) -> tuple[np.ndarray, np.ndarray]:
        if self._factors is None:
            raise RuntimeError("solve() comes before questions about units")
        return self._factors

    def _find_factors(self) -> tuple[np.ndarray, np.ndarray]:
        """For every root that is a cell its row and its column, -1 elsewhere."""
        factors = np.full((2, self._size), -1, np.int64)
        for grid in self._grids:
            p, q = np.nonzero(~(self.frozen(grid.rows)[:, None] | self.frozen(grid.columns)))
            cells = self.find(grid.cells[p, q])
            factors[:, cells] = self.find(grid.rows[p]), self.find(grid.columns[q])
        self._break_circles(factors)
        return factors[0], factors[1]

    def _break_circles(self, factors: np.ndarray) -> None:
        """Freeze what is, over several products, a factor of itself."""
        below = np.nonzero(factors[0] >= 0)[0]
        start = below
        for _ in range(64):  # nobody splits an axis that often
            if not len(below):
                return
            above = np.unique(self.find(factors[:, below].ravel()))
            below = above[factors[0, above] >= 0]
        self.freeze(np.concatenate([start, *factors[:, start]]), "its axis is a part of itself")
        factors[:, start] = -1
