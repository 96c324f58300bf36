"""What masks removed is cut out: of the function, its parameters and the optimizer's state."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune._event import PruneState, is_packed
from jaxprune._tree import (
    is_array,
    is_hole,
    leaves_by_path,
    leaves_with_path,
    list_paths,
    map_with_path,
)
from jaxprune._types import Masks, Params
from jaxprune.graph import Rule
from jaxprune.graph._network import mirrored_outputs
from jaxprune.graph._shrunk import small_function
from jaxprune.graph._take import take
from jaxprune.groups import Cut, Groups, is_dropped, kept_indices
from jaxprune.masks import Packed, apply_masks, pack, unpack


def shrink(
    fn: Callable[..., Any],
    params: Params,
    masks: Masks | None = None,
    *,
    cut: Mapping[str, Any] | None = None,
    groups: Groups | None = None,
    counts: str = "masked",
    rules: Mapping[str, Rule] | None = None,
    cut_outputs: bool = False,
) -> tuple[Callable[..., Any], Params]:
    """Cut what masks remove out of a function and its parameters.

    The small function computes what the function computes with the removed slices set to zero,
    with arrays that are smaller. It traces ``fn`` anew for every shape of inputs and evaluates its
    program on the small parameters, so that other batch sizes work, ``jit``, ``grad``, ``vmap`` and
    ``jax.export`` too; derivative rules of custom functions are kept.

    Args:
      fn: function of params and inputs, of any library.
      params: the whole parameters, the tree that ``fn`` takes.
      masks: masks of ``Coupled`` groups of this function, of blocks, or both combined; None where
        nothing is cut. Subtrees may be left out.
      cut: instead of masks, what ``cut_list`` says, perhaps read from JSON.
      groups: carry the masks over to all members of these groups first, such as from params to the
        running statistics beside them.
      counts: what a mean over cut channels divides by, in LayerNorm and the like: ``"masked"``
        keeps the old number, which equals the masked network; ``"rescaled"`` takes the number that
        is left, which equals the module built at the smaller width.
      rules: rules for further primitives, as for ``find_groups``.
      cut_outputs: let results lose the channels that are cut instead of refusing the masks: for a
        function that returns its hidden features too, see ``feature_loss``. Masks are found for
        the function that returns predictions alone.

    Returns:
      ``(small_fn, small_params)``. ``small_params`` is a tree of the same structure; parameters of
      a block that is left out have size 0. What is wrong with masks for this very function is told
      when ``small_fn`` is first called, since only then the inputs are known.

    Raises:
      ValueError: masks of single weights, masks of unknown paths, both or none of ``masks`` and
        ``cut``, ``counts`` unknown. When called: masks that contradict what is coupled, a group
        emptied, params of other shapes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxprune as jp
      >>> mlp = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
      >>> params = {"w": jnp.array([[1.0, 3.0, 2.0]]), "v": jnp.ones((3, 1))}
      >>> groups = jp.find_groups(mlp, params, jnp.ones((1, 1)))
      >>> masks = jp.find_masks(params, 0.3, pattern=jp.patterns.Coupled(groups))
      >>> small_fn, small_params = shrink(mlp, params, masks)
      >>> small_params["w"], small_fn(small_params, jnp.ones((1, 1)))
      (Array([[3., 2.]], dtype=float32), Array([[5.]], dtype=float32))
    """
    if counts not in ("masked", "rescaled"):
        raise ValueError(
            f"`shrink(counts={counts!r})` is unknown. Use 'masked' to equal the masked network, "
            "or 'rescaled' to equal the module built at the smaller width."
        )
    if (masks is None) == (cut is None):
        raise ValueError("`shrink` takes either `masks` or `cut`, one of them.")
    if masks is not None:
        cut = cut_list(params, masks if groups is None else groups.spread(masks, params))
    kept = _read_cut(cut or {}, params)
    return (
        small_function(fn, params, kept, counts=counts, rules=rules, cut_outputs=cut_outputs),
        _cut_tree(params, kept),
    )


def cut_list(params: Params, masks: Masks) -> Cut:
    """Say which indices of which axes masks keep: what ``shrink`` needs, in plain numbers.

    Args:
      params: the whole parameters.
      masks: masks that remove whole indices of axes; subtrees may be left out.

    Returns:
      For each path that is cut a dict from axis to the kept indices. It goes through JSON and
      back into ``shrink(fn, params, cut=...)``.

    Raises:
      ValueError: masks of single weights, of unknown paths or of shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> cut_list({"w": jnp.ones((2, 3))}, {"w": jnp.array([[True, False, True]])})
      {'w': {1: [0, 2]}}
    """
    leaves = leaves_by_path(params, "cut_list")
    shapes = {path: leaf.shape for path, leaf in leaves.items() if is_array(leaf)}
    given = leaves_by_path(masks, "cut_list")
    unknown = [path for path in given if path not in shapes]
    if unknown:
        raise ValueError(
            f"The masks name {list_paths(unknown)}, which the params lack; their paths are "
            f"{list_paths(list(shapes))}. Nest the masks as the params are."
        )
    for path, mask in given.items():
        fits = jnp.ndim(mask) == len(shapes[path]) and all(
            m in (1, n) for m, n in zip(jnp.shape(mask), shapes[path], strict=True)
        )
        if not fits or np.asarray(mask).dtype != bool:
            raise ValueError(
                f"The mask of {path!r} is {np.asarray(mask).dtype}{list(jnp.shape(mask))}, which "
                f"does not fit its shape {list(shapes[path])}. Masks are bool, of the same rank, "
                "each axis full or 1."
            )
    found: Cut = {}
    for path, axes in kept_indices(masks).items():
        if is_dropped(axes):
            found[path] = {0: []}
        elif any(indices is not None for indices in axes):
            found[path] = {i: k.tolist() for i, k in enumerate(axes) if k is not None}
    return found


def _read_cut(cut: Mapping[str, Any], params: Params) -> dict[str, dict[int, np.ndarray]]:
    """Check a cut list; JSON has turned the axes into strings."""
    leaves = leaves_by_path(params, "shrink")
    shapes = {path: leaf.shape for path, leaf in leaves.items() if is_array(leaf)}
    kept: dict[str, dict[int, np.ndarray]] = {}
    for path, axes in cut.items():
        for axis, indices in axes.items():
            i, k = int(axis), np.asarray(indices, np.int64).reshape(-1)
            n = shapes[path][i] if path in shapes and i < len(shapes[path]) else None
            if n is None or (len(k) and (k[0] < 0 or k[-1] >= n or (np.diff(k) <= 0).any())):
                raise ValueError(
                    f"The cut keeps {indices} of axis {axis} of {path!r}, but the params have "
                    f"{shapes.get(path, 'no such path')}. Pass increasing indices, as "
                    "`jp.cut_list` gives them for these params."
                )
            kept.setdefault(path, {})[i] = k
    return kept


def _cut_tree(tree: Any, kept: Mapping[str, Mapping[int, np.ndarray]]) -> Any:
    return map_with_path(lambda path, leaf: _cut_leaf(leaf, kept.get(path, {})), tree)


def _cut_leaf(leaf: Any, axes: Mapping[int, np.ndarray]) -> Any:
    if not is_array(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = [len(axes.get(i, range(n))) for i, n in enumerate(leaf.shape)]
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    if not axes:
        return jnp.copy(leaf)  # so that donating the small ones leaves the whole ones alone
    return take(jnp.asarray(leaf), [axes.get(i) for i in range(leaf.ndim)])


def shrink_state(
    tx: optax.GradientTransformation, opt_state: optax.OptState, params: Params, masks: Masks
) -> optax.OptState:
    """Cut an optimizer state as ``shrink`` cuts the parameters, to go on training the small ones.

    Moments and all else that lies beside a parameter is cut as it is; counts and keys stay. The
    structure is that of ``tx.init(small_params)``. A pruner around the optimizer is cut too: its
    masks become those of the small network.

    Args:
      tx: the optimizer that made the state.
      opt_state: its state for the whole params.
      params: the whole params.
      masks: the masks that ``shrink`` gets, of these params.

    Returns:
      The state for the small params.

    Raises:
      ValueError: masks that do not fit, as for ``cut_list``; a state that is not made of slices of
        the old one, such as adafactor's where another axis is the longest now.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.ones((2, 3))}
      >>> tx = optax.adam(0.1)
      >>> masks = {"w": jnp.array([[True, False, True]])}
      >>> shrink_state(tx, tx.init(params), params, masks)[0].mu["w"].shape
      (2, 2)
    """
    kept = _read_cut(cut_list(params, masks), params)
    cuts = map_with_path(lambda path, leaf: _Axes(kept.get(path, {}), jnp.shape(leaf)), params)

    def cut(leaf: Any, axes: _Axes) -> Any:
        if is_hole(leaf) or not is_array(leaf):
            return leaf
        if leaf.ndim == len(axes.shape) - 1:  # adafactor sums over one axis
            axes = axes.summed(leaf.shape)
        if leaf.ndim != len(axes.shape):
            return leaf
        fits = {i: k for i, k in axes.kept.items() if leaf.shape[i] == axes.shape[i]}
        return _cut_leaf(leaf, fits)

    is_pruner = lambda node: isinstance(node, PruneState)  # noqa: E731
    bare = jax.tree.map(_unpacked, opt_state, is_leaf=is_pruner)
    small = optax.tree.map_params(tx, cut, bare, cuts, is_leaf=is_hole)
    state = jax.tree.map(_packed_like, opt_state, small, is_leaf=is_pruner)
    _check_state(tx, state, _cut_tree(params, kept))
    return state


def _check_state(tx: optax.GradientTransformation, state: Any, small: Params) -> None:
    """Refuse a state that the optimizer would have made otherwise: adafactor goes by sizes."""
    try:
        fresh = jax.eval_shape(tx.init, small)
    except ValueError:  # a pruner around it has the groups of the whole params
        return
    for (path, want), got in zip(leaves_with_path(fresh), jax.tree.leaves(state), strict=True):
        if want.shape != jnp.shape(got):
            raise ValueError(
                f"The state at {path!r} has shape {jnp.shape(got)} once it is cut, but "
                f"for the small params the optimizer keeps one of {want.shape}. Start anew: "
                "`tx.init(small_params)`."
            )


def _unpacked(node: Any) -> Any:
    return node._replace(masks=unpack(node.masks)) if isinstance(node, PruneState) else node


def _packed_like(old: Any, new: Any) -> Any:
    """Pack the masks of a pruner that had them packed."""
    packed = isinstance(old, PruneState) and any(
        isinstance(m, Packed) for m in jax.tree.leaves(old.masks, is_leaf=is_packed)
    )
    return new._replace(masks=pack(new.masks)) if packed else new


class _Axes:
    """What to keep of a parameter: a leaf, whatever the tree around it."""

    def __init__(self, kept: Mapping[int, np.ndarray], shape: tuple[int, ...]) -> None:
        self.kept, self.shape = kept, shape

    def summed(self, shape: tuple[int, ...]) -> "_Axes":
        """What to keep of a sum over one axis, if its shape tells which of them that was."""
        found = []
        for gone in range(len(self.shape)):
            left = [i for i in range(len(self.shape)) if i != gone]
            if tuple(self.shape[i] for i in left) == shape:
                found.append(
                    _Axes({j: self.kept[i] for j, i in enumerate(left) if i in self.kept}, shape)
                )
        if len({str(axes.kept) for axes in found}) > 1:
            raise ValueError(
                f"The optimizer keeps sums of shape {shape} for a parameter of shape {self.shape}, "
                "which do not tell the axis that was summed. Start anew: `tx.init(small_params)`."
            )
        return found[0] if found else _Axes({}, ())


def verify_shrink(
    fn: Callable[..., Any],
    params: Params,
    masks: Masks,
    *inputs: Any,
    groups: Groups | None = None,
    counts: str = "masked",
    rules: Mapping[str, Rule] | None = None,
) -> float:
    """Measure how far the small function is from the masked one.

    Args:
      fn: function of params and inputs.
      params: the whole params.
      masks: masks, as for ``shrink``.
      *inputs: inputs to compare on.
      groups: as for ``shrink``.
      counts: as for ``shrink``.
      rules: as for ``shrink``.

    Returns:
      The largest difference between outputs, as a fraction of the largest of the small ones;
      infinite where one of them is not finite and the other is.
      New values of the state are compared where they stay.

    Raises:
      ValueError: as for ``shrink``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mlp = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
      >>> params = {"w": jnp.array([[1.0, 3.0]]), "v": jnp.ones((2, 1))}
      >>> masks = {"w": jnp.array([[True, False]]), "v": jnp.array([[True], [False]])}
      >>> verify_shrink(mlp, params, masks, jnp.ones((1, 1)))
      0.0
    """
    if groups is not None:
        masks = groups.spread(masks, params)
    small_fn, small_params = shrink(fn, params, masks, counts=counts, rules=rules)
    small = small_fn(small_params, *inputs)
    large = fn(apply_masks(params, _over(masks, params)), *inputs)
    kept = _read_cut(cut_list(params, masks), params)
    arrays = [(path, leaf) for path, leaf in leaves_with_path(params) if is_array(leaf)]
    paths, specs = [path for path, _ in arrays], [leaf for _, leaf in arrays]
    worst, scale, numbers = 0.0, 0.0, 0.0
    outs = zip(
        jax.tree.leaves(large),
        jax.tree.leaves(small),
        mirrored_outputs(jax.eval_shape(lambda: large), paths, specs),
        strict=True,
    )
    for whole, less, state in outs:
        cut_whole = _cut_leaf(
            jnp.asarray(whole), kept.get(paths[state], {}) if state is not None else {}
        )
        if cut_whole.size and jnp.issubdtype(cut_whole.dtype, jnp.inexact):
            both_nan = jnp.isnan(cut_whole) & jnp.isnan(less)
            gap = jnp.where((cut_whole == less) | both_nan, 0, jnp.abs(cut_whole - less))
            apart = float(jnp.max(gap))
            worst = max(worst, apart if math.isfinite(apart) else math.inf)
            scale = max(scale, float(jnp.max(jnp.where(jnp.isfinite(less), jnp.abs(less), 0))))
        elif not np.array_equal(_numbers(cut_whole), _numbers(less)):
            numbers = 1.0  # whole numbers are of no scale
    return max(worst / scale if scale else worst, numbers)


def _numbers(x: jax.Array) -> jax.Array:
    """What NumPy can compare: keys as their data."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _over(masks: Masks, params: Params) -> Masks:
    """Masks for all of the params, None where subtrees were left out."""
    given = leaves_by_path(masks, "verify_shrink")
    return map_with_path(lambda path, _: given.get(path), params)


def masks_within_budget(
    find: Callable[[float], Masks], cost: Callable[[Masks], float], budget: float
) -> Masks:
    """Find the lowest sparsity whose masks cost no more than a budget, by bisection.

    The cost is whatever counts: a fraction of the parameters or of the FLOPs that are left,
    milliseconds, bytes. It has to fall as the sparsity grows.

    Args:
      find: makes masks of a sparsity in [0, 1].
      cost: says what masks cost.
      budget: the most that they may cost.

    Returns:
      Masks of the lowest sparsity, to within 1/1024, that cost at most ``budget``.

    Raises:
      ValueError: even at sparsity 1 they cost more.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> params = {"kernel": jnp.arange(10.0).reshape(1, 10)}
      >>> masks = masks_within_budget(
      ...     lambda s: jp.find_masks(params, s), lambda m: 1 - jp.sparsity(m, params), 0.35)
      >>> jp.sparsity(masks, params)
      0.7
    """
    masks = find(0.0)
    if cost(masks) <= budget:
        return masks
    best = find(1.0)
    least = cost(best)
    if least > budget:
        raise ValueError(
            f"`masks_within_budget` cannot reach a budget of {budget:g}: at sparsity 1 the cost is "
            f"still {least:g}. Raise the budget, or let more be removed: other groups, blocks, a "
            "higher `max_sparsity`."
        )
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        masks = find(middle)
        if cost(masks) <= budget:
            best, high = masks, middle
        else:
            low = middle
    return best


def size_of(params: Params, masks: Masks) -> int:
    """Count the parameters that are left once masks are cut out.

    Args:
      params: the whole params.
      masks: masks that remove whole indices of axes.

    Returns:
      The number of entries of all arrays of the small params.

    Raises:
      ValueError: as for ``cut_list``.

    Example:
      >>> import jax.numpy as jnp
      >>> size_of({"w": jnp.ones((2, 3))}, {"w": jnp.array([[True, False, True]])})
      4
    """
    cut = cut_list(params, masks)
    total = 0
    for path, leaf in leaves_with_path(params):
        shape: Sequence[int] = [
            len(cut.get(path, {}).get(i, range(n))) for i, n in enumerate(jnp.shape(leaf))
        ]
        total += int(np.prod(shape, dtype=np.int64)) if is_array(leaf) else 0
    return total
