"""What of which parameter a value shows: sources, and what is made of several."""

# A parameter may be rearranged before it meets data. A source says which axes of which parameter
# lie along each axis of a value, outermost first, and what has become of the others:
#
#     w: f32[4,12]                        axes ((0:4), (1:12))
#     reshape w to [4,3,4]                axes ((0:4), (1:3), (1:4))
#     that transposed, as [12,4]          axes ((1:3 1:4), (0:4))      two factors along one axis
#     w[2]                                axes ((1:12),), and axis 0 is gone: read one by one
#
# A factor says no more than which axes lie along it. Where a reshape cuts through factors, or a
# concatenation lays several beside one another, it stands for all of them at once: whatever role
# it gets, each of them gets, and an axis whose parts get several roles has none.

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from jaxprune.graph._site import Site

Kind: TypeAlias = Literal["", "gain", "product", "linear", "embedding"]
Number: TypeAlias = float | None  # what a removed weight becomes; None where others decide


LOOKED_UP = "data looks its indices up, in {}"


@dataclasses.dataclass(frozen=True)
class Note:
    """A reason, put into words where somebody asks: ``{}`` is the operation and its line."""

    text: str
    at: Site | None = None

    def __str__(self) -> str:
        return self.text.format("" if self.at is None else self.at.name())


class Factor(NamedTuple):
    """Indices that lie along an axis of a value.

    Attributes:
      axes: the axes of the parameter that they belong to; none where values are only repeated.
      size: how many there are.
      met: whether data that the value was multiplied with runs along them.
    """

    axes: frozenset[int]
    size: int
    met: bool = False


Factors: TypeAlias = tuple[Factor, ...]


@dataclasses.dataclass(frozen=True)
class Gone:
    """Axes of a parameter that a value does not have any more.

    Attributes:
      axes: which they are.
      role: what has taken them: ``"layer"`` (a loop runs over them), ``"in"`` (summed together with
        data), or None.
      why: the reason, where that is no role.
      scan: the scan whose slices the value is one of, so that it can lay them in a row again.
      reduced: whether they have been summed or mixed up without any data.
    """

    axes: frozenset[int]
    role: str | None
    why: Note = dataclasses.field(default=Note(""), compare=False)
    scan: tuple[int, int] | None = None
    reduced: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """A parameter, as a value shows it.

    Attributes:
      leaf: number of the parameter.
      axes: for each axis of the value the factors that lie along it.
      gone: axes of the parameter that the value does not have.
      one: what a removed weight becomes, if the others stay.
      all: what it becomes if everything beside it is removed as well.
      through: the function that made something else than zero of it.
      kind: ``"gain"`` for what scales a larger parameter, ``"product"`` for what data has been
        multiplied with, ``"linear"`` for what a constant has been summed over with,
        ``"embedding"`` for what data has been looked up in.
      number: tells products and looked-up values apart.
      where: the product or the look-up.
    """

    leaf: int
    axes: tuple[Factors, ...]
    gone: tuple[Gone, ...] = ()
    one: Number = 0.0
    all: Number = 0.0
    through: Note | None = dataclasses.field(default=None, compare=False)
    kind: Kind = ""
    number: tuple[int, int] | None = None
    where: Note | None = dataclasses.field(default=None, compare=False)

    @property
    def is_mixed(self) -> bool:
        """Whether a function has summed over axes of it, or mixed them up."""
        return any(gone.reduced for gone in self.gone)

    @property
    def is_reduced(self) -> bool:
        """Whether nothing of any axis is left: it is a number made of the parameter."""
        return not any(factor.axes for factors in self.axes for factor in factors)

    @property
    def stays_zero(self) -> bool:
        return self.one == 0 and self.all == 0


def source_of(leaf: int, shape: Sequence[int]) -> Source:
    """The source that a parameter is of itself."""
    return Source(leaf, tuple((Factor(frozenset((i,)), n),) for i, n in enumerate(shape)))


@dataclasses.dataclass(frozen=True)
class Value:
    """What a value is made of.

    Attributes:
      kind: ``"constant"`` (of numbers in the program), ``"count"`` (of those and of the number of
        the round of a loop), ``"data"`` (of inputs, too), or ``"weights"`` (of parameters).
      sources: of weights; or what data has just been looked up in, or multiplied with.
    """

    kind: Literal["constant", "count", "data", "weights"]
    sources: tuple[Source, ...] = ()


CONSTANT, COUNT, DATA = Value("constant"), Value("count"), Value("data")


def weights(sources: Sequence[Source]) -> Value:
    """What is made of parameters; sources that say the same count once."""
    return Value("weights", tuple(dict.fromkeys(sources)))


# Factors along an axis.


def axes_in(factors: Factors) -> frozenset[int]:
    """All axes of the parameter among some factors."""
    return frozenset[int]().union(*(factor.axes for factor in factors))


def repeated(size: int) -> Factors:
    """An axis along which nothing of the parameter lies."""
    return (Factor(frozenset(), size),)


def blended(factors: Factors, size: int) -> Factors:
    """An axis along which some factors lie in a way that is not looked into."""
    return (Factor(axes_in(factors), size, any(factor.met for factor in factors)),)


def resized(factors: Factors, old: int, new: int) -> Factors:
    """The factors of an axis of which a part is left, or beside which something was put."""
    if new == old:
        return factors
    return blended(factors, new)


def split(factors: Factors, sizes: Sequence[int]) -> list[Factors]:
    """Give an axis that consists of some factors the sizes of several axes, outermost first.

    ``(0:4, 1:6)`` as ``[2, 2, 6]`` is ``(0:2), (0:2), (1:6)``; as ``[8, 3]`` both axes are blended.
    """
    left = [factor for factor in factors if factor.size != 1]
    out: list[Factors] = []
    for i, size in enumerate(sizes):
        taken: list[Factor] = []
        need = size
        while need > 1 and left:
            factor = left.pop(0)
            if need % factor.size == 0:
                taken.append(factor)
                need //= factor.size
            elif factor.size % need == 0:
                taken.append(factor._replace(size=need))
                left.insert(0, factor._replace(size=factor.size // need))
                need = 1
            else:
                rest = (*taken, factor, *left)
                return [*out, *(blended(rest, n) for n in sizes[i:])]
        out.append(tuple(taken) or repeated(size))
    return out


def dropped(source: Source, places: Sequence[int], at: Site) -> tuple[Gone, ...]:
    """What is gone if axes of size one are taken away."""
    axes = frozenset[int]().union(*(axes_in(source.axes[i]) for i in places))
    note = Note("its single index is taken away by {}", at)
    return (*source.gone, Gone(axes, None, note)) if axes else source.gone


def without(source: Source, places: Sequence[int], gone: Sequence[Gone]) -> Source:
    """A source without some axes of the value."""
    axes = tuple(factors for i, factors in enumerate(source.axes) if i not in places)
    left = [one for one in gone if one.axes]
    return dataclasses.replace(source, axes=axes, gone=(*source.gone, *left))
