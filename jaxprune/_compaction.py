"""Which weights are held by their kept blocks: the one truth by which all else is compacted."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._block_form import Form, form_of
from jaxprune._cut_state import CannotCutError
from jaxprune._errors import check_living
from jaxprune._kept import check_fit, shapes_of
from jaxprune._masks import apply_masks
from jaxprune._tree import (
    check_regexes_match,
    is_array,
    leaves_by_path,
    leaves_with_path,
    list_paths,
    map_with_path,
)
from jaxprune._where import compile_regex
from jaxprune.graph._blocked import put_blocks, take_blocks
from jaxprune.graph._network import spec_of
from jaxprune.typing import Leaf, Masks, Params

Only: TypeAlias = str | Sequence[str] | None

# What a product of blocks costs beside the whole one, for each row of data: the share of the
# weights that is left, and the gather. That moves `columns * kept * bi` numbers where the product
# makes `columns * kept * bi * bo` multiplications, so that it weighs the more the narrower blocks
# are. Measured by `python -m benchmarks.compact`, at 64 and more rows.
_GATHER = 200
_WORTH = 0.8  # of the cost of the whole product; a gain smaller than that is not worth a thought
_LEAST = 1 << 16  # weights of a leaf, below which calling costs more than computing


@dataclasses.dataclass(frozen=True, eq=False)
class Compaction:
    """Which weights of some params are held by their kept blocks.

    Attributes:
      whole: the whole params as shapes.
      forms: by path, the weights that are held by blocks.
      dense: by path, why other weights that masks cover are held as they are.
      masks: masks of those, None elsewhere.
    """

    whole: Params
    forms: Mapping[str, Form]
    dense: Mapping[str, str]
    masks: Masks

    def params(self, tree: Params) -> Params:
        """Params with blocks in the place of weights, and masked where they stay as they are."""

        def take(tree: Params) -> Params:
            return map_with_path(self._take, apply_masks(tree, self._over(tree)))

        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
            return jax.eval_shape(take, tree)
        return take(tree)

    def expand(self, tree: Params) -> Params:
        """The whole params, with zeros where blocks are gone."""
        missing = [p for p in self.forms if p not in dict(leaves_with_path(tree))]
        if missing:
            raise ValueError(
                f"`expand` got a tree without {list_paths(missing)}. Pass the params that "
                "`jp.compact` gave, or that were trained from them, nested as the whole ones."
            )

        def put(path: str, leaf: Leaf) -> Leaf:
            form = self.forms.get(path)
            if form is None:
                return leaf
            if jnp.shape(leaf) != form.shape:
                raise ValueError(
                    f"`expand` got {path!r} of shape {jnp.shape(leaf)}, wanted {form.shape}, the "
                    "blocks that the masks leave. Pass the params that `jp.compact` gave, or that "
                    "were trained from them, with the same masks and `only`."
                )
            return put_blocks(leaf, jnp.asarray(form.index), form.axes)

        return map_with_path(put, tree)

    def place(self, path: str, shape: tuple[int, ...]) -> "Place":
        """What an optimizer keeps of a weight."""
        return Place(path, shape, self.forms.get(path))

    def _take(self, path: str, leaf: Leaf) -> Leaf:
        form = self.forms.get(path)
        return leaf if form is None else take_blocks(leaf, form.index, form.axes, form.block)

    def _over(self, tree: Params) -> Masks:
        """Masks of what stays dense, for all of a tree."""
        given = leaves_by_path(self.masks, "compact")
        return map_with_path(lambda path, _: given.get(path), tree)


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """What an optimizer keeps of a weight that is held by its blocks."""

    path: str
    shape: tuple[int, ...]
    form: Form | None

    def take(self, part: jax.Array) -> jax.Array:
        """The kept blocks of what lies beside the weight; masks may be broadcast."""
        form = self.form
        if form is None:
            return part
        if part.shape != self.shape and part.dtype == bool:
            part = jnp.broadcast_to(part, self.shape)
        if part.shape != self.shape:
            raise self._cannot(part.shape)
        return take_blocks(part, form.index, form.axes, form.block)

    def along(self, axis: int) -> "Place":
        """A vector along one axis has no blocks."""
        if self.form is not None:
            raise self._cannot((self.shape[axis],))
        return Place(self.path, (self.shape[axis],), None)

    def summed(self, shape: tuple[int, ...]) -> "Place":
        """A sum over one axis has none either."""
        if self.form is not None:
            raise self._cannot(shape)
        return Place(self.path, shape, None)

    def _cannot(self, shape: tuple[int, ...]) -> CannotCutError:
        return CannotCutError(
            f"The optimizer keeps an array of shape {shape} for {self.path!r} of shape "
            f"{self.shape}, which has no part for each of its blocks. Start anew: "
            "`tx.init(sparse_params)`."
        )


def compaction_of(params: Params, masks: Masks, only: Only, user: str) -> Compaction:
    """Read from masks which weights are held by blocks.

    Raises:
      ValueError: masks that do not fit or that are no balanced blocks, where they are asked for;
        no weight is left that gains.
    """
    check_living(masks)
    shapes = shapes_of(params, user)
    check_fit(masks, shapes, user)
    regexes = _regexes(only, user)
    check_regexes_match(regexes, masks, user)
    forms: dict[str, Form] = {}
    dense: dict[str, str] = {}
    for path, mask in leaves_by_path(masks, user).items():
        wanted = not regexes or any(re.fullmatch(regex, path) for regex in regexes)
        found = _form(path, mask, shapes[path]) if wanted else "it is not in `only`"
        why = found if isinstance(found, str) else "" if only is not None else no_gain(found)
        if isinstance(found, Form) and not why:
            forms[path] = found
        elif why:
            dense[path] = why
    if not forms:
        told = "; ".join(f"{path!r}: {why}" for path, why in list(dense.items())[:6])
        raise ValueError(
            f"`{user}` found no weight to hold by its blocks{': ' if told else ''}{told}. Prune "
            'larger blocks, `pattern=jp.patterns.Blocks((128, 128), axes=("in", "out")), '
            f"scope=jp.scopes.per_output`{', or insist with `only=...`' * (only is None)}."
        )
    left = map_with_path(lambda path, mask: mask if path in dense else None, masks)
    whole = jax.tree.map(lambda x: spec_of(x) if is_array(x) else x, params)
    return Compaction(whole, forms, dense, left)


def _regexes(only: Only, user: str) -> tuple[str, ...]:
    if only is None:
        return ()
    regexes = tuple(only) if isinstance(only, list | tuple) else (only,)
    for regex in regexes:
        compile_regex(regex, f"{user}(only=...)")
    return regexes


def _form(path: str, mask: jax.Array, shape: Sequence[int]) -> Form | str:
    """How a weight is held by blocks, or why it is not."""
    if sum(n > 1 for n in shape) < 2:
        return "it is a vector"
    form = form_of(np.broadcast_to(np.asarray(mask), shape), path)
    return "nothing of it is removed" if form is None else form


def no_gain(form: Form) -> str:
    """Why a product is faster with the whole weight; nothing if it is not.

    The time of a product of blocks, as a fraction of that of the whole one, is taken for
    ``share * (1 + 200 / bo)`` where ``share`` of the blocks are left and each has ``bo`` outputs.
    """
    kept, blocks = form.kept
    inputs, outputs = form.matrix
    bi, bo = form.block
    if inputs * outputs < _LEAST:
        return f"{inputs} x {outputs} is too small to gain"
    time = cost_of(form)
    if time > _WORTH:
        return (
            f"with {kept} of {blocks} blocks of {bi} x {bo} left it would take some {time:.2f} of "
            "the time, which is too little gained"
        )
    return ""


def cost_of(form: Form) -> float:
    """The estimated time of a product of blocks, as a fraction of that of the whole weight."""
    kept, blocks = form.kept
    return kept / blocks * (1 + _GATHER / form.block[1])


def bytes_of(form: Form, dtype: Any) -> int:
    """Bytes of the kept blocks and their indices."""
    return math.prod(form.shape) * np.dtype(dtype).itemsize + 4 * form.index.size
