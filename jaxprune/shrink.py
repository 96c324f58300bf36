"""What masks removed is cut out: of the function, its parameters and the optimizer's state."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune._errors import check_living
from jaxprune._event import PruneState, is_packed, searches
from jaxprune._tree import is_hole, leaves_with_path, list_paths, path_str
from jaxprune._types import Masks, Params
from jaxprune.graph import Rule
from jaxprune.graph._carry import Carry
from jaxprune.graph._network import check_call, is_array, spec_of
from jaxprune.graph._shrunk import Surgery, small_function
from jaxprune.graph._take import take
from jaxprune.groups import Cut, Groups, is_dropped, kept_indices
from jaxprune.masks import Packed, apply_masks, pack, unpack


def shrink(
    fn: Callable[..., Any],
    params: Params,
    masks: Masks | None = None,
    *inputs: Any,
    cut: Mapping[str, Any] | None = None,
    groups: Groups | None = None,
    counts: str = "masked",
    rules: Mapping[str, Rule] | None = None,
    cut_outputs: bool = False,
    carry: Carry | None = None,
    **keywords: Any,
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
      *inputs: inputs of ``fn`` as for ``find_groups``, arrays or ``jax.ShapeDtypeStruct``. They
        are needed with ``carry``; without, they let it tell at once what is wrong with the masks.
      cut: instead of masks, what ``cut_list`` says, perhaps read from JSON.
      groups: carry the masks over to all members of these groups first, such as from params to the
        running statistics beside them. Whatever the network still used of those members goes
        with them, biases under masks of kernels, say: ``verify_shrink`` tells how far it moves.
      counts: what a mean over cut channels divides by, in LayerNorm and the like: ``"masked"``
        keeps the old number, which equals the masked network; ``"rescaled"`` takes the number that
        is left, which equals the module built at the smaller width.
      rules: rules for further primitives, as for ``find_groups``.
      cut_outputs: let results lose the channels that are cut instead of refusing the masks: for a
        function that returns its hidden features too, see ``feature_loss``. Masks are found for
        the function that returns predictions alone.
      carry: as for ``find_groups``: what goes in and comes out again, cut on both sides. The small
        function takes the whole carry, which it cuts, or a small one, and returns a small one.
      **keywords: keyword arguments of ``fn`` beside ``inputs``. The small function takes inputs
        and keywords as ``fn`` does.

    Returns:
      ``(small_fn, small_params)``. ``small_params`` is a tree of the same structure; parameters of
      a block that is left out have size 0. What is wrong with masks for this very function is told
      when ``small_fn`` is first called, since only then the inputs are known.

    Raises:
      TypeError: ``fn`` is no function of the params; ``carry`` without inputs.
      ValueError: masks of single weights, masks of unknown paths, both or none of ``masks`` and
        ``cut``, ``counts`` unknown. When called, or where inputs are given: masks that
        contradict what is coupled, a group emptied, params of other shapes.

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
    check_call(fn, keywords, shrink)
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
    surgery = Surgery(fn, _shapes(params), kept, counts, rules, cut_outputs, carry)
    if carry is not None and not (inputs or keywords):
        raise TypeError(
            "`shrink(carry=...)` needs inputs to know how large the whole carry is. Call "
            "`jp.shrink(fn, params, masks, *inputs, carry=...)` with those of `jp.find_groups`."
        )
    carried = surgery.plan(inputs, keywords).left_of_carry() if inputs or keywords else ()
    return small_function(surgery, carried), _cut_tree(params, kept)


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
    check_living(masks)
    check_living(params, "params")
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves_with_path(params)}
    given = leaves_with_path(masks)
    unknown = [path for path, _ in given if path not in shapes]
    if unknown:
        raise ValueError(
            f"The masks name {list_paths(unknown)}, which the params lack; their paths are "
            f"{list_paths(list(shapes))}. Nest the masks as the params are."
        )
    for path, mask in given:
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
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves_with_path(params)}
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
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _cut_leaf(leaf, kept.get(path_str(path), {})), tree
    )


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
    structure is that of ``tx.init(small_params)``, nnx variables around its arrays included.

    After a cut training goes on with ``tx = jp.hold(inner)``: the groups in a pruner are those of
    the whole network, and its schedule would take the same share of what is left once more. Pass
    this ``tx`` with the state of the pruner, whatever it was: its inner state is cut and its masks
    become those of the small network, dense, or with the single weights that it had removed too.

    Args:
      tx: the optimizer to go on with: that which made the state, or ``jp.hold(inner)``.
      opt_state: the state for the whole params.
      params: the whole params, the tree that ``tx.init`` got.
      masks: the masks that ``shrink`` gets, of these params.

    Returns:
      The state for the small params.

    Raises:
      TypeError: an ``nnx.Optimizer`` instead of its ``opt_state``.
      ValueError: masks that do not fit, as for ``cut_list``; the state of other params; a pruner
        that has events to come; a state that is not made of slices of the old one, such as
        adafactor's where another axis is the longest now.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> mlp = lambda p, x: (x @ p["w"]) @ p["v"]
      >>> params = {"w": jnp.array([[1.0, 3.0, 2.0]]), "v": jnp.ones((3, 1))}
      >>> coupled = jp.patterns.Coupled(jp.find_groups(mlp, params, jnp.ones((1, 1))))
      >>> tx = jp.prune(optax.adam(0.1), schedule=jp.schedules.constant(0.3), pattern=coupled)
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> masks = jp.get_masks(state)
      >>> small_fn, small = jp.shrink(mlp, params, masks)
      >>> tx = jp.hold(optax.adam(0.1))  # from here on
      >>> state = shrink_state(tx, state, params, masks)
      >>> updates, state = tx.update(small, state, small)
      >>> updates["w"].shape
      (1, 2)
    """
    if hasattr(opt_state, "opt_state"):
        raise TypeError(
            f"`shrink_state` got a {type(opt_state).__name__} instead of an optimizer state. Pass "
            "its `opt_state`, and `nnx.state(model, nnx.Param)` as params."
        )
    _refuse_events(tx, opt_state)
    plain = _without_variables(params)
    kept = _read_cut(cut_list(plain, masks), plain)
    cuts = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _Axes(kept.get(path_str(path), {}), jnp.shape(leaf)), plain
    )
    given = _without_variables(opt_state)
    old = jax.tree.map(_unpacked, given, is_leaf=_is_pruner)
    try:
        cut = optax.tree.map_params(
            tx, _cut_beside, _adopted(tx, old, plain), cuts, is_leaf=lambda _: True
        )
    except ValueError as error:
        raise ValueError(
            "`shrink_state` got the state of another tree than its params, which have "
            f"{list_paths([path for path, _ in leaves_with_path(plain)])}. Pass `tx` as it made "
            "the state (or `jp.hold` of the same optimizer), and the tree that `tx.init` got with "
            'the masks of this tree: `variables["params"]` and `masks["params"]`, mostly.'
        ) from error
    small = _cut_tree(plain, kept)
    cut = _settled(tx, jax.tree.map(_packed_like, given, cut, is_leaf=_is_pruner), small)
    return _as_given(opt_state, cut)


def _refuse_events(tx: optax.GradientTransformation, opt_state: optax.OptState) -> None:
    """Refuse a pruner that would prune again: its groups and shares are those of the whole."""
    ends = [search.schedule.end for search in searches(tx) if hasattr(search.schedule, "end")]
    counts = [node.count for node in jax.tree.leaves(opt_state, is_leaf=_is_pruner)
              if _is_pruner(node)]  # fmt: skip
    done = min((int(jnp.min(jnp.asarray(count))) for count in counts), default=0)
    if ends and done <= max(ends):
        raise ValueError(
            f"`shrink_state` got a pruner with events to come: its schedule ends at update "
            f"{max(ends)}, and {done} were made. It would look for groups of the whole network and "
            "take the same share of what is left once more. Go on with `tx = jp.hold(inner)`, "
            "whose state is `jp.shrink_state(tx, opt_state, params, masks)`."
        )


def _cut_beside(value: Any, cuts: Any) -> Any:
    """Cut what an optimizer keeps in the place of the params."""
    places: Any = jax.tree.structure(cuts)
    try:
        parts = places.flatten_up_to(value)
    except ValueError:  # one hole in the place of several params
        return jax.tree.map(_cut_one, value, cuts, is_leaf=is_hole)
    return places.unflatten(map(_cut_one, parts, jax.tree.leaves(cuts)))


def _cut_one(part: Any, axes: "_Axes") -> Any:
    """Cut what an optimizer keeps beside one parameter: an array, mostly like it."""
    if is_hole(part):
        return part
    if isinstance(part, list | tuple):  # one vector for each axis, in sm3
        alone = [_Axes({0: axes.kept[i]} if i in axes.kept else {}, (n,))
                 for i, n in enumerate(axes.shape)]  # fmt: skip
        return type(part)(map(_cut_one, part, alone)) if len(part) == len(alone) else part
    if not is_array(part):
        return part
    if part.ndim == len(axes.shape) - 1:  # adafactor sums over one axis
        axes = axes.summed(part.shape)
    if part.ndim != len(axes.shape):
        return part
    return _cut_leaf(part, {i: k for i, k in axes.kept.items() if part.shape[i] == axes.shape[i]})


def _adopted(tx: optax.GradientTransformation, state: Any, params: Params) -> Any:
    """Let ``hold`` take over from a pruner: all that it needs are the masks."""

    def adopt(want: Any, got: Any) -> Any:
        if not (_is_pruner(want) and _is_pruner(got)):
            return got
        memory = got.criterion_state if jax.tree.leaves(want.criterion_state) else ()
        return got._replace(criterion_state=memory, key=None if want.key is None else got.key)

    try:
        return jax.tree.map(adopt, jax.eval_shape(tx.init, params), state, is_leaf=_is_pruner)
    except ValueError:  # which is told below
        return state


def _settled(tx: optax.GradientTransformation, state: Any, small: Params) -> Any:
    """Give masks the shape that the optimizer makes; refuse what it would have made otherwise."""
    try:
        fresh = jax.eval_shape(tx.init, small)
    except ValueError:  # a pruner around it has the groups of the whole params
        return state
    state = jax.tree.map(_settle_masks, fresh, state, is_leaf=_is_pruner)
    leaves = jax.tree_util.tree_leaves_with_path(_without_masks(fresh))
    for (path, want), got in zip(leaves, jax.tree.leaves(_without_masks(state)), strict=True):
        if want.shape != jnp.shape(got):
            raise ValueError(
                f"The state at {path_str(path)!r} has shape {jnp.shape(got)} once it is cut, but "
                f"for the small params the optimizer keeps one of {want.shape}. Start anew: "
                "`tx.init(small_params)`."
            )
    return state


def _settle_masks(want: Any, got: Any) -> Any:
    if not _is_pruner(want):
        return got
    packed = any(map(is_packed, jax.tree.leaves(want.masks, is_leaf=is_packed)))
    masks = dict(leaves_with_path(unpack(got.masks)))
    like = jax.eval_shape(unpack, want.masks)
    new = jax.tree_util.tree_map_with_path(
        lambda path, m: _settle(m, masks.get(path_str(path))), like, is_leaf=is_hole
    )
    return got._replace(masks=pack(new) if packed else new)


def _settle(want: Any, mask: Any) -> Any:
    """A mask as ``want`` has it: none where nothing is removed, dense where there was none."""
    if is_hole(want):
        return want if mask is None or bool(jnp.all(mask)) else mask
    return jnp.broadcast_to(True if mask is None else mask, want.shape)


def _without_masks(state: Any) -> Any:
    return jax.tree.map(
        lambda node: node._replace(masks=()) if _is_pruner(node) else node,
        state,
        is_leaf=_is_pruner,
    )


def _is_pruner(node: Any) -> bool:
    return isinstance(node, PruneState)


def _is_variable(node: Any) -> bool:
    """True for an nnx variable, known by what it can do: the core does not import flax."""
    return hasattr(node, "get_value") and hasattr(node, "set_value")


def _without_variables(tree: Any) -> Any:
    return jax.tree.map(
        lambda v: v.get_value() if _is_variable(v) else v, tree, is_leaf=_is_variable
    )


def _as_given(old: Any, new: Any) -> Any:
    """Put nnx variables back around the arrays that they held."""

    def put(old: Any, new: Any) -> Any:
        if not _is_pruner(old):
            whole = _is_variable(old) and not is_hole(new)
            return jax.tree.unflatten(jax.tree.structure(old), [new]) if whole else new
        memory, masks = new.criterion_state, _leaves_by_path(old.masks)
        return new._replace(
            count=put(old.count, new.count),
            masks=jax.tree_util.tree_map_with_path(
                lambda path, m: put(masks.get(path_str(path)), m), new.masks, is_leaf=is_packed
            ),
            inner_state=_as_given(old.inner_state, new.inner_state),
            criterion_state=_as_given(old.criterion_state, memory) if memory != () else (),
            key=put(old.key, new.key),
        )

    return jax.tree.map(put, old, new, is_leaf=lambda v: _is_pruner(v) or _is_variable_or_mask(v))


def _is_variable_or_mask(node: Any) -> bool:
    return _is_variable(node) or is_packed(node)


def _leaves_by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable_or_mask)
    return {path_str(path): leaf for path, leaf in leaves}


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
    carry: Carry | None = None,
    **keywords: Any,
) -> float:
    """Measure how far the small function is from the masked one.

    The masked one has the weights that ``masks`` remove set to zero and no others, as it was
    trained, also where ``groups`` carry the masks further: what the small function loses besides
    is part of the difference.

    Args:
      fn: function of params and inputs.
      params: the whole params.
      masks: masks, as for ``shrink``.
      *inputs: inputs to compare on.
      groups: as for ``shrink``.
      counts: as for ``shrink``.
      rules: as for ``shrink``.
      carry: as for ``shrink``. Both start from the carry that is given, so what it holds at
        removed units counts if the network looks at it.
      **keywords: keyword arguments of ``fn``.

    Returns:
      The largest difference between outputs, as a fraction of the largest of the small ones;
      infinite where one of them is not finite and the other is; at least 1 where integers differ.
      New values of the state and of a carry are compared where they stay.

    Raises:
      TypeError, ValueError: as for ``shrink``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mlp = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
      >>> params = {"w": jnp.array([[1.0, 3.0]]), "v": jnp.ones((2, 1))}
      >>> masks = {"w": jnp.array([[True, False]]), "v": jnp.array([[True], [False]])}
      >>> verify_shrink(mlp, params, masks, jnp.ones((1, 1)))
      0.0
    """
    check_call(fn, keywords, verify_shrink)
    spread = masks if groups is None else groups.spread(masks, params)
    kept = _read_cut(cut_list(params, spread), params)
    surgery = Surgery(fn, _shapes(params), kept, counts, rules, carry=carry)
    plan = surgery.plan(inputs, keywords)
    small_fn = small_function(surgery, plan.left_of_carry())
    small = small_fn(_cut_tree(params, kept), *inputs, **keywords)
    large = fn(apply_masks(params, _over(masks, params)), *inputs, **keywords)
    worst, scale, otherwise = 0.0, 0.0, 0.0
    outs = zip(jax.tree.leaves(large), jax.tree.leaves(small), plan.left_of_outputs(), strict=True)
    for whole, less, left in outs:
        cut_whole = take(jnp.asarray(whole), left)
        if cut_whole.size and jnp.issubdtype(cut_whole.dtype, jnp.inexact):
            both_nan = jnp.isnan(cut_whole) & jnp.isnan(less)
            gap = jnp.where((cut_whole == less) | both_nan, 0, jnp.abs(cut_whole - less))
            apart = float(jnp.max(gap))
            worst = max(worst, apart if math.isfinite(apart) else math.inf)
            scale = max(scale, float(jnp.max(jnp.where(jnp.isfinite(less), jnp.abs(less), 0))))
        elif cut_whole.size and not np.array_equal(_numbers(cut_whole), _numbers(less)):
            otherwise = 1.0  # whatever the scale of the others
    return max(worst / scale if scale else worst, otherwise)


def _shapes(params: Params) -> Params:
    """Arrays as their shapes; what is no array is held as it is."""
    return jax.tree.map(lambda x: spec_of(x) if is_array(x) else x, params)


def _numbers(x: jax.Array) -> jax.Array:
    """What NumPy can compare: keys as their data."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _over(masks: Masks, params: Params) -> Masks:
    """Masks for all of the params, None where subtrees were left out."""
    given = dict(leaves_with_path(masks))
    return jax.tree_util.tree_map_with_path(lambda path, _: given.get(path_str(path)), params)


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
