"""Which indices stay: the one truth by which functions, params and states are made smaller."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune._cut_state import Indices, cut_state
from jaxprune._errors import check_living
from jaxprune._groups import Groups
from jaxprune._kept import (
    as_mask,
    check_fit,
    composed,
    count,
    fitting,
    kept_by,
    layer_axis,
    name_part,
    path_in,
    read,
    shapes_of,
)
from jaxprune._state import without_variables
from jaxprune._tree import is_array, is_hole, list_paths, map_with_path, slots
from jaxprune.graph import Rule
from jaxprune.graph._carry import Carry
from jaxprune.graph._network import check_call, spec_of
from jaxprune.graph._shrunk import Surgery, small_function
from jaxprune.graph._take import take_kept
from jaxprune.typing import Masks, Params


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Cut(Mapping[str, Mapping[int, np.ndarray]]):
    """Which indices of which parameters stay, in numbers of the whole network.

    A mapping from paths to axes to the indices that stay, increasing; what it does not name stays
    whole. By it a function, its params, trees beside them and an optimizer state are made smaller,
    each alone or all of them, and masks are needed no more. ``jp.shrink`` and ``jp.shrink_state``
    are the shorthands.

    Where the layers of a stack keep others each, indices are a row for each layer, as many in each,
    laid out as in the leaf: `[layers, 1, kept]` of axis 2 of a leaf `[layers, in, out]`.

    Cuts are hashable, and equal where the same indices stay. They go through JSON and back,
    ``jp.Cut(json.loads(json.dumps(cut.json)), params)``, and those of several rounds compose,
    ``second.after(first)``.

    Attributes:
      kept: path: axis: indices; axes may be strings, as JSON has them.
      whole: the whole params, of which only shapes are remembered: ``fn`` and ``state`` need them,
        and with them sizes are checked. None where nobody knows them.

    Raises:
      TypeError: ``kept`` is no such mapping.
      ValueError: indices that do not increase, or paths and indices that ``whole`` lacks.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxprune as jp
      >>> mlp = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
      >>> params = {"w": jnp.array([[1.0, 3.0, 2.0]]), "v": jnp.ones((3, 1))}
      >>> cut = Cut({"w": {1: [1, 2]}, "v": {0: [1, 2]}}, params)
      >>> cut
      Cut(w axis 1: 2 of 3, v axis 0: 2 of 3)
      >>> cut.fn(mlp)(cut.params(params), jnp.ones((1, 1)))
      Array([[5.]], dtype=float32)
    """

    kept: Mapping[str, Mapping[int, np.ndarray]]
    whole: Params | None = None

    def __post_init__(self) -> None:
        if self.whole is not None:
            object.__setattr__(self, "whole", _without_values(self.whole))
        shapes = None if self.whole is None else self._shapes
        object.__setattr__(self, "kept", MappingProxyType(read(self.kept, shapes)))

    @classmethod
    def from_masks(
        cls, masks: Masks, params: Params | None = None, *, groups: Groups | None = None
    ) -> "Cut":
        """Read from masks what stays.

        Args:
          masks: masks that remove whole indices of axes; None where nothing is cut, and subtrees
            may be left out.
          params: the whole params or their shapes, by which the masks are checked.
          groups: carry the masks over to all members of these groups first.

        Raises:
          TypeError: ``groups`` without ``params``.
          ValueError: masks of single weights, of unknown paths or of shapes that do not fit.

        Example:
          >>> import jax.numpy as jnp
          >>> Cut.from_masks({"w": jnp.array([[True, False, True]])}).json
          {'w': {1: [0, 2]}}
        """
        check_living(masks)
        if params is None:
            if groups is not None:
                raise TypeError(
                    "`Cut.from_masks(groups=...)` needs `params` to carry masks over to. Call "
                    "`jp.Cut.from_masks(masks, params, groups=groups)`."
                )
            return cls(kept_by(masks))
        check_living(params, "params")
        if groups is not None:
            masks = groups.complete(masks, params)
        shapes = shapes_of(params, "Cut")
        check_fit(masks, shapes, "Cut")
        layers = {} if groups is None else groups.stacked
        return cls(kept_by(masks, shapes=shapes, layers=layers), params)

    def __getitem__(self, path: str) -> Mapping[int, np.ndarray]:
        return self.kept[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    @cached_property
    def _key(self) -> frozenset[tuple[str, int, tuple[int, ...], bytes]]:
        return frozenset((path, i, k.shape, k.tobytes()) for path, i, k in self._axes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cut) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cut, (self.json, self.whole)

    def __repr__(self) -> str:
        size = lambda path, i: "" if self.whole is None else f" of {self._shapes[path][i]}"  # noqa: E731
        each = lambda i, k: "" if layer_axis(k, i) is None else " a layer"  # noqa: E731
        axes = [
            f"{path} axis {i}: {count(k, i)}{size(path, i)}{each(i, k)}"
            for path, i, k in self._axes()
        ]
        more = [f"and {len(axes) - 12} more"] if len(axes) > 12 else []
        return f"Cut({', '.join([*axes[:12], *more])})"

    def _axes(self) -> Iterator[tuple[str, int, np.ndarray]]:
        return ((path, i, k) for path, axes in self.items() for i, k in axes.items())

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the whole params by path; none where nobody knows them."""
        return {} if self.whole is None else shapes_of(self.whole, "Cut")

    @property
    def json(self) -> dict[str, dict[int, list[Any]]]:
        """The indices in plain numbers, for ``json.dumps``; ``jp.Cut`` reads what comes back."""
        return {path: {i: k.tolist() for i, k in axes.items()} for path, axes in self.items()}

    def params(self, tree: Any) -> Any:
        """Take what stays out of a tree that has the paths of the cut.

        Params, gradients, averages of params, masks: an axis of size 1 that stands for a longer
        one, as masks have it, stays 1. Leaves that the cut does not name are copied.

        Args:
          tree: arrays or shapes of the whole network; None for leaves and subtrees left out.

        Returns:
          The same tree with smaller arrays; those of a block that is left out have size 0.

        Raises:
          ValueError: a path of the cut is not in the tree, or has another size.

        Example:
          >>> import jax.numpy as jnp
          >>> Cut({"w": {1: [0, 2]}}).params({"w": jnp.array([[1.0, 2.0, 3.0]]), "b": None})
          {'b': None, 'w': Array([[1., 3.]], dtype=float32)}
        """
        found = {slot.path: slot.leaf for slot in slots(tree)}
        holes = tuple(f"{path}/" for path, leaf in found.items() if is_hole(leaf))
        missing = [p for p in self if p not in found and not f"{p}/".startswith(holes)]
        if missing:
            raise ValueError(
                f"The cut names {list_paths(missing)}, which the tree lacks; its paths are "
                f"{list_paths(list(found))}. Take the cut of a part, `cut.at(prefix)` or "
                "`cut.at(tree)`, or nest the tree as the params are."
            )
        shapes_of(tree, "cut.params")  # refuses leaves that have one path
        arrays = {path: found[path].shape for path in self if is_array(found.get(path))}
        axes = fitting(self, arrays, self._shapes)
        return map_with_path(lambda path, leaf: take_kept(leaf, axes.get(path, {})), tree)

    def masks(self, like: Params | None = None) -> Masks:
        """Make masks that remove what does not stay.

        Args:
          like: the whole params or their shapes, for a cut that does not know them.

        Returns:
          Masks like the params, an axis full where it is cut and 1 elsewhere; None where nothing
          is cut.

        Raises:
          ValueError: nobody knows the whole params, or ``like`` has other paths and sizes.

        Example:
          >>> import jax.numpy as jnp
          >>> Cut({"w": {1: [0, 2]}}).masks({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
          {'b': None, 'w': Array([[ True, False,  True]], dtype=bool)}
        """
        cut = self if like is None else Cut(self.kept, like)
        whole, shapes = cut._known("masks"), cut._shapes

        def mask(path: str, _: Any) -> jax.Array | None:
            if path not in cut:
                return None
            return jnp.asarray(as_mask(cut[path], shapes[path]))

        return map_with_path(mask, whole)

    def fn(
        self,
        fn: Callable[..., Any],
        *inputs: Any,
        counts: str = "masked",
        rules: Mapping[str, Rule] | None = None,
        cut_outputs: bool = False,
        carry: Carry | None = None,
        **keywords: Any,
    ) -> Callable[..., Any]:
        """Make the small function, which takes small params.

        Args:
          fn: function of the whole params and inputs, of any library.
          *inputs: as for ``shrink``, and so are the settings.
          counts: as for ``shrink``.
          rules: as for ``shrink``.
          cut_outputs: as for ``shrink``.
          carry: as for ``shrink``.
          **keywords: keyword arguments of ``fn`` beside ``inputs``.

        Raises:
          TypeError, ValueError: as for ``shrink``; ``ValueError`` also where nobody knows the
            whole params.

        Example:
          >>> import jax.numpy as jnp
          >>> params = {"w": jnp.array([[1.0, 3.0]]), "v": jnp.ones((2, 1))}
          >>> cut = Cut({"w": {1: [1]}, "v": {0: [1]}}, params)
          >>> cut.fn(lambda p, x: (x @ p["w"]) @ p["v"])(cut.params(params), jnp.ones((1, 1)))
          Array([[3.]], dtype=float32)
        """
        check_call(fn, keywords, Cut.fn)
        surgery = Surgery(fn, self._known("fn"), self, counts, rules, cut_outputs, carry)
        if carry is not None and not (inputs or keywords):
            raise TypeError(
                "`shrink(carry=...)` needs inputs to know how large the whole carry is. Call "
                "`jp.shrink(fn, params, masks, *inputs, carry=...)` or "
                "`cut.fn(fn, *inputs, carry=...)` with those of `jp.find_groups`."
            )
        carried = surgery.plan(inputs, keywords).left_of_carry() if inputs or keywords else ()
        return small_function(surgery, carried)

    def state(self, tx: optax.GradientTransformation, state: optax.OptState) -> optax.OptState:
        """Cut an optimizer state, to go on training the small params.

        The cut has to be one of the tree that ``tx.init`` got: ``cut.at("params")`` where that is
        a part of flax variables.

        Args:
          tx: the optimizer to go on with, as for ``shrink_state``.
          state: the state for the whole params.

        Returns:
          The state for the small params, of the structure of ``tx.init(small_params)``.

        Raises:
          TypeError, ValueError: as for ``shrink_state``; ``ValueError`` also where nobody knows
            the whole params.

        Example:
          >>> import jax.numpy as jnp, optax
          >>> params, tx = {"w": jnp.ones((2, 3))}, optax.adam(0.1)
          >>> state = Cut({"w": {1: [0, 2]}}, params).state(tx, tx.init(params))
          >>> state[0].mu["w"].shape
          (2, 2)
        """
        whole = without_variables(self._known("state"))
        indices = lambda path, shape: Indices(self.get(path, {}), shape)  # noqa: E731
        return cut_state(tx, state, whole, self.params(whole), indices)

    def at(self, part: str | Params) -> "Cut":
        """Give the cut of a part of the whole tree, such as an optimizer sees.

        Args:
          part: the prefix of a subtree, which is taken off the paths: ``cut.at("params")`` of flax
            variables. Or a tree with the same paths but fewer leaves:
            ``cut.at(nnx.state(model, nnx.Param))``.

        Raises:
          ValueError: the whole tree has no such part.

        Example:
          >>> cut = Cut({"params/w": {1: [0, 2]}, "batch_stats/mean": {0: [0, 2]}})
          >>> cut.at("params")
          Cut(w axis 1: 2)
        """
        inside = path_in(part)
        paths = [*self, *self._shapes]
        if paths and all(inside(path) is None for path in paths):
            raise ValueError(
                f"`cut.at({name_part(part)})` finds nothing below it. The paths are "
                f"{list_paths(sorted(set(paths)))}."
            )
        kept = {new: axes for path, axes in self.items() if (new := inside(path)) is not None}
        if not isinstance(part, str):
            return Cut(kept, part)
        return Cut(kept, None if self.whole is None else _below(self.whole, part))

    def after(self, first: "Cut") -> "Cut":
        """Put two rounds together: this cut, of the network that ``first`` has left, and ``first``.

        A kept index of this cut counts the indices that ``first`` kept: of ``[0, 2, 5]`` of the
        whole network ``[0, 2]`` are 0 and 5. So ``second.after(first)`` does at once what the two
        do one after the other, to functions, params and states of the whole network.

        Args:
          first: the cut that went before, of the whole network.

        Raises:
          ValueError: this cut is not of the network that ``first`` leaves.

        Example:
          >>> second, first = Cut({"w": {1: [0, 2]}}), Cut({"w": {1: [0, 2, 5], 0: [1]}})
          >>> second.after(first).json
          {'w': {1: [0, 5], 0: [1]}}
        """
        if first.whole is not None:
            small = first.params(first.whole)
            Cut(self.kept, small)  # refuses what the small network has not
            _check_same(self._shapes, shapes_of(small, "cut.after"))
        return Cut(composed(self, first), first.whole)

    def _known(self, user: str) -> Params:
        """The shapes of the whole params, or what to do without them."""
        if self.whole is None:
            raise ValueError(
                f"`cut.{user}` needs the shapes of the whole params, which this cut does not know: "
                "it was read from a file or from masks alone. Make it with them: "
                "`jp.Cut(cut.json, params)`, or `jp.Cut.from_masks(masks, params)`."
            )
        return self.whole


def _without_values(params: Params) -> Params:
    """Arrays as their shapes; what is no array is held as it is."""
    return jax.tree.map(lambda x: spec_of(x) if is_array(x) else x, params)


def _below(tree: Params, prefix: str) -> Params | None:
    """The subtree at a prefix of paths; None where no node is called that."""
    for word in filter(None, prefix.split("/")):
        children = jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda x, top=tree: x is not top
        )
        names = {jax.tree_util.keystr(keys, simple=True): child for keys, child in children}
        tree = names.get(word)
    return tree


def _check_same(got: Mapping[str, tuple[int, ...]], small: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse to compose a cut with one that left a network of other sizes."""
    wrong = [
        f"{path!r} has shape {shape}, but the first leaves {small.get(path, 'no such path')}"
        for path, shape in got.items()
        if small.get(path) != shape
    ]
    if wrong:
        raise ValueError(
            f"The second cut is not of the network that the first leaves: {'; '.join(wrong[:6])}. "
            "Make it of the small params: `jp.Cut.from_masks(masks, first.params(params))`."
        )
