"""What masks removed is cut out, of functions, params and states: shorthands of a cut."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jaxprune._cut import Cut
from jaxprune._groups import Groups
from jaxprune._state import without_variables
from jaxprune._tree import is_array
from jaxprune.graph import Rule
from jaxprune.graph._carry import Carry
from jaxprune.graph._network import check_call
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
      cut: instead of masks, a ``Cut``, or what ``cut_list`` says, perhaps read from JSON.
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
    whole = cut_of(params, masks, cut, groups, "shrink")
    small_fn = whole.fn(
        fn,
        *inputs,
        counts=counts,
        rules=rules,
        cut_outputs=cut_outputs,
        carry=carry,
        **keywords,
    )
    return small_fn, whole.params(params)


def cut_of(
    params: Params,
    masks: Masks | None,
    cut: Mapping[str, Any] | None,
    groups: Groups | None,
    user: str,
) -> Cut:
    """The cut of these params, from masks or from what was read."""
    if (masks is None) == (cut is None):
        raise ValueError(f"`{user}` takes either `masks` or `cut`, one of them.")
    return Cut.from_masks(masks, params, groups=groups) if cut is None else Cut(cut, params)


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
    plain = without_variables(params)
    return Cut.from_masks(masks, plain).state(tx, opt_state)


def cut_list(params: Params, masks: Masks) -> dict[str, dict[int, list[Any]]]:
    """Say which indices of which axes masks keep: what ``shrink`` needs, in plain numbers.

    Args:
      params: the whole parameters.
      masks: masks that remove whole indices of axes; subtrees may be left out.

    Returns:
      For each path that is cut a dict from axis to the kept indices, nested where each layer of a
      stack keeps others (see ``Cut``). It goes through JSON and
      back into ``shrink(fn, params, cut=...)``.

    Raises:
      ValueError: masks of single weights, of unknown paths or of shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> cut_list({"w": jnp.ones((2, 3))}, {"w": jnp.array([[True, False, True]])})
      {'w': {1: [0, 2]}}
    """
    return Cut.from_masks(masks, params).json


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
    cut = Cut.from_masks(masks, params)
    small = jax.tree.leaves(cut.params(cut.whole))
    return sum(math.prod(leaf.shape) for leaf in small if is_array(leaf))
