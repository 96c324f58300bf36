"""What params, scores, masks and the four parts are: all that the library asks of a part."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar

import jax
from jax.typing import ArrayLike

__all__ = (
    "Bindable",
    "Choosy",
    "Counting",
    "Criterion",
    "CrossLeaf",
    "DType",
    "ElementwiseCriterion",
    "Keeping",
    "Layout",
    "Lazy",
    "LazyScope",
    "Leaf",
    "Masks",
    "MemoryCriterion",
    "Method",
    "Params",
    "Pattern",
    "Phased",
    "Schedule",
    "Scope",
    "Scores",
    "Settling",
    "Sparsity",
    "Tiling",
    "Tree",
    "Units",
    "Where",
    "WithinLeaf",
)

#: Any pytree.
Tree: TypeAlias = Any
#: Of one: an array, or what looks like one.
Leaf: TypeAlias = Any
#: A dtype, or a scalar type that stands for one.
DType: TypeAlias = Any
#: Pytree of float arrays.
Params: TypeAlias = Any
#: Like Params; higher = keep; None where not prunable.
Scores: TypeAlias = Any
#: Like Scores; one entry for what lives or dies together, the leaf's rank.
Units: TypeAlias = Any
#: Like Scores; bool, broadcastable; True = kept.
Masks: TypeAlias = Any
#: Fraction removed in [0, 1]: one number, or one per prunable leaf.
Sparsity: TypeAlias = Any
#: A `jp.Layout`: what each axis means; None where nobody said.
Layout: TypeAlias = Any
#: Predicate of path and array, as ("Dense_0/kernel", array): is the leaf prunable?
Where: TypeAlias = Callable[[str, jax.Array], bool]

# What has to be there is in `Criterion`, `Pattern`, `Scope` and `Schedule`. The other protocols are
# what a part *may* have as well: the library asks by the name of the method, so that a part of
# one's own is as good as one of ours.


class Criterion(Protocol):
    """Says how much each weight is worth. A plain function does."""

    def __call__(self, params: Params, *args: Any, **evidence: Any) -> Scores:
        """Score the prunable leaves, higher = keep.

        Evidence comes by keyword: what a criterion needs it names by keyword-only arguments, the
        rest it swallows with ``**_``. There are no further ``args``.

        Where the user gave a layout, a criterion that names ``layout`` is given it, settled on the
        params, and minds stacks of layers itself. One that is neither that nor elementwise is
        shown the list of its layers in the place of each stack.
        """


class MemoryCriterion(Criterion, Protocol):
    """A criterion that remembers training; its state reaches it as ``state=``."""

    def init(self, params: Params) -> Any:
        """Make the memory of the start, from the prunable leaves."""

    def update(self, state: Any, params: Params, grads: Params) -> Any:
        """Take one step of training into the memory."""


class ElementwiseCriterion(Criterion, Protocol):
    """A criterion marked with ``jp.elementwise``.

    A function that wraps it, be it by ``functools.wraps``, is not marked until somebody says so.
    """

    elementwise: Any


class Pattern(Protocol):
    """Says what is removed together. Frozen, hashable, holds no arrays.

    It may say ``neighbours = False``: its units do not lie side by side along the axes of a leaf,
    so that no scope can rank them in windows. A ``pool`` that is marked ``jp.elementwise`` gives
    back the scores as they are.
    """

    def pool(self, scores: Scores) -> Units:
        """Make one score for each unit; leaves keep their rank, with axes of size 1."""

    def expand(self, keep: Any, *, like: Params) -> Masks:
        """Turn bools of units into masks that broadcast over the weights."""


PartT_co = TypeVar("PartT_co", covariant=True)


class Bindable(Protocol[PartT_co]):
    """A pattern or a scope that has to see the params before it can say what it does.

    Where the user gave a layout it gets that, too, if its ``bind`` takes a ``layout``, and ranks
    the layers of stacks itself. If pattern or scope does not, both see each layer as a leaf.
    """

    def bind(self, params: Params, *, where: Where, layout: Layout = None) -> PartT_co:
        """Give the part settled on these params: what it covers, which axes it means."""


class Settling(Pattern, Protocol):
    """A pattern that has a say in how many units stay."""

    def settle(self, units: Units, keep: Units, alive: Units) -> Units:
        """Correct what a scope kept. ``alive`` are bools like ``units``, or None where all are."""


class Tiling(Pattern, Protocol):
    """A pattern whose units are boxes of one size, side by side from the first weight of a leaf on.

    Masks that are kept as bits then have one for each unit instead of one for each weight. So what
    it expands has to be full and constant within a unit.
    """

    def tile(self, path: str, rank: int) -> tuple[int, ...]:
        """Give the size of a unit along each axis of a leaf; () where each weight is a unit.

        The last unit of an axis may be smaller. Asked once the pattern is bound.
        """


class CrossLeaf(Pattern, Protocol):
    """A pattern whose units own parts of several leaves, biases and scales among them.

    It may have two more: ``units_layout``, the layout of its units, which the scope is bound to
    in the place of that of the params; and ``per_layer``, names of units of which every layer of a
    stack has to keep as many, which a scope that cannot promise that refuses.
    """

    def owns(self, path: str, array: jax.Array) -> bool:
        """Say whether a leaf takes part, in the place of ``where``."""

    def of_units(self, sparsity: Sparsity) -> Sparsity:
        """Give the sparsities of its units out of a tree of numbers, or say what is missing."""


class Scope(Protocol):
    """Says who competes with whom. A plain function does.

    ``sparsity`` is a number of Python where it is known, so that there is one program for each
    number, and a float32 inside of ``prune``.
    """

    def __call__(self, units: Units, sparsity: Sparsity, *, within: Any = None) -> Any:
        """Say which units stay: bools like ``units``. Those outside ``within`` never do."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lazy:
    """Scores of a leaf, or what is kept of it, as what they are made from.

    Stored scores are a buffer of the size of the params for as long as a search lasts. Made anew
    at every pass they cost some arithmetic, which a search that waits for memory has time for.

    Attributes:
      operands: the weights `[...]` first, then evidence: arrays like them, or anything else.
      score: from the operands to scores `[...]`.
      dtype: of the scores.
    """

    operands: tuple[Any, ...]
    score: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    shape = property(lambda self: self.operands[0].shape)
    size = property(lambda self: self.operands[0].size)
    ndim = property(lambda self: self.operands[0].ndim)


class LazyScope(Scope, Protocol):
    """A scope that says ``lazy = True``: the leaves of its units may be ``Lazy``.

    If it has an attribute ``lazily`` as well, a function that is called as the scope is and gives
    ``Lazy`` bools, then masks are compared where they are stored. Those need not know of
    ``within``: what earlier masks have removed is taken away by whoever reads them.
    """

    lazy: bool


class Counting(Scope, Protocol):
    """A scope that can say beforehand how many units it keeps.

    Counts of known numbers are made by Python, exactly, and travel as integers: one program for
    all numbers.
    """

    def counts(self, units: Units, sparsity: Sparsity) -> Any:
        """Give integers, in any tree, which the scope takes in the place of ``sparsity``.

        Of ``units`` shapes suffice. What it gave is handed to it again, to be given back. Of the
        keywords that ``functools.partial`` bound to the scope it gets those that it names.
        """


class Choosy(Scope, Protocol):
    """A scope that does not go with every pattern, or with every sparsity."""

    def refuses(self, pattern: Pattern) -> str | None:
        """Say why a pattern cannot be ranked, and what can; None where it can."""

    def check_sparsity(self, sparsity: Sparsity, *, exact: bool) -> None:
        """Raise for a sparsity that makes no sense, or, if ``exact``, that cannot be met.

        Asked by ``find_masks`` and ``make_masks``, exactly, and by what has a schedule about the
        number that it ends with.
        """


class WithinLeaf(Scope, Protocol):
    """A scope that lets units compete inside of a leaf only, as ``rigl`` and ``set`` ask for it.

    They keep the balance that it promises: at each index of those axes as many units grow as are
    dropped.
    """

    def apart(self, units: Units) -> list[tuple[int, ...]]:
        """Give, for each leaf, the axes at each index of which units compete by themselves.

        `()` where all units of the leaf do. Of ``units`` shapes suffice.
        """


class Schedule(Protocol):
    """Says how much and when, in one object, so that the two cannot disagree."""

    def __call__(self, step: ArrayLike) -> Any:
        """Give the sparsity at a step, counted from 0."""

    def due(self, step: ArrayLike) -> Any:
        """Say whether masks are found again at this update."""


class Phased(Schedule, Protocol):
    """What a schedule can say beside.

    Attributes:
      final: the sparsity that it arrives at, as it was asked for; counts are exact from there on.
      end: step of the last event.
    """

    final: Sparsity
    end: int

    def before(self, step: ArrayLike) -> Any:
        """Give the step of the last event before one at ``step``: has sparsity fallen since?"""


class Keeping(Protocol):
    """Says what stays of a matrix: pattern, scope and sparsity put together. A function does.

    It may have more, as ``jp.Keep`` has: ``block(scores, start)``, the mask of some inputs only,
    from ``start`` on; ``window``, how many neighbouring inputs compete, None where all do; and
    ``unit``, how many inputs are removed together, None where always all are.
    """

    def __call__(self, scores: jax.Array, /) -> jax.Array:
        """Give a bool mask of scores `[inputs, outputs]`, True for what stays."""


class Method(Protocol):
    """Prunes one matrix by what its inputs are like. A plain function does.

    It may say ``per_output = True``: where nobody names a scope, the inputs of each output compete;
    and ``diagonal = True``: of the Gram matrix its diagonal `[inputs]` suffices.
    """

    def __call__(
        self, w: jax.Array, gram: jax.Array, /, *, keep: Keeping
    ) -> tuple[jax.Array, jax.Array]:
        """Give new weights and mask `[inputs, outputs]` of a matrix `w` of that shape.

        ``gram`` is inputs^T inputs over all rows of data, `[inputs, inputs]`.
        """


F = TypeVar("F", bound=Callable[..., Any])


def elementwise(f: F) -> F:
    """Mark a criterion whose score of a weight needs the evidence of that weight only.

    Its scores are then computed where a ranking reads them, and never lie in memory. Evidence
    that mirrors the params reaches it leaf by leaf, all other evidence whole; so it maps over its
    arguments with ``jax.tree.map`` and looks at nothing else.

    Args:
      f: a criterion, or the ``__call__`` of one.

    Returns:
      The same function, marked.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxprune as jp
      >>> @jp.elementwise
      ... def closeness(params, *, target, **_):
      ...     return jax.tree.map(lambda w, t: -jnp.abs(w - t), params, target)
      >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> target = {"w": jnp.array([[1.0, 0.0], [3.5, 4.0]])}
      >>> jp.find_masks(params, 0.25, criterion=closeness, target=target)["w"]
      Array([[ True, False],
             [ True,  True]], dtype=bool)
    """
    # An object of its own: `functools.wraps` copies marks, and a wrapper may do anything.
    f.elementwise = object()  # type: ignore[attr-defined]
    return f
