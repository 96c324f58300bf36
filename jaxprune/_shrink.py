"""What masks removed is cut out: of the function and its parameters."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._errors import check_living
from jaxprune._groups import Cut, Groups, is_dropped, kept_indices
from jaxprune._masks import apply_masks
from jaxprune._tree import is_array, leaves_by_path, leaves_with_path, list_paths, map_with_path
from jaxprune.graph import Rule
from jaxprune.graph._carry import Carry
from jaxprune.graph._network import check_call, spec_of
from jaxprune.graph._shrunk import Surgery, small_function
from jaxprune.graph._take import take
from jaxprune.typing import Masks, Params


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
    kept = read_cut(cut or {}, params)
    surgery = Surgery(fn, _shapes(params), kept, counts, rules, cut_outputs, carry)
    if carry is not None and not (inputs or keywords):
        raise TypeError(
            "`shrink(carry=...)` needs inputs to know how large the whole carry is. Call "
            "`jp.shrink(fn, params, masks, *inputs, carry=...)` with those of `jp.find_groups`."
        )
    carried = surgery.plan(inputs, keywords).left_of_carry() if inputs or keywords else ()
    return small_function(surgery, carried), cut_tree(params, kept)


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


def read_cut(cut: Mapping[str, Any], params: Params) -> dict[str, dict[int, np.ndarray]]:
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


def cut_tree(tree: Any, kept: Mapping[str, Mapping[int, np.ndarray]]) -> Any:
    """Take the kept indices out of all leaves of a tree."""
    return map_with_path(lambda path, leaf: cut_leaf(leaf, kept.get(path, {})), tree)


def cut_leaf(leaf: Any, axes: Mapping[int, np.ndarray]) -> Any:
    """Take the kept indices of some axes out of an array or a shape."""
    if not is_array(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = [len(axes.get(i, range(n))) for i, n in enumerate(leaf.shape)]
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    if not axes:
        return jnp.copy(leaf)  # so that donating the small ones leaves the whole ones alone
    return take(jnp.asarray(leaf), [axes.get(i) for i in range(leaf.ndim)])


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
    kept = read_cut(cut_list(params, spread), params)
    surgery = Surgery(fn, _shapes(params), kept, counts, rules, carry=carry)
    plan = surgery.plan(inputs, keywords)
    small_fn = small_function(surgery, plan.left_of_carry())
    small = small_fn(cut_tree(params, kept), *inputs, **keywords)
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
