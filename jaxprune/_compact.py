"""What masks removed in blocks is not computed: functions, params and states by kept blocks."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._advice import PruneWarning
from jaxprune._checks import check_inner
from jaxprune._compaction import Compaction, Only, compaction_of
from jaxprune._cut_state import adopted, cut_state
from jaxprune._masks import apply_masks
from jaxprune._state import without_variables
from jaxprune._states import is_pruner, pruners
from jaxprune._tree import (
    is_array,
    join_static,
    leaves_by_path,
    leaves_with_path,
    list_paths,
    split_static,
    wide,
)
from jaxprune._values import is_concrete
from jaxprune._verify import difference, masks_over
from jaxprune.graph._blocked import Blocked
from jaxprune.graph._network import Program, check_call, program_of, specs_beside
from jaxprune.graph._sparse import Evaluation, Seen
from jaxprune.typing import Masks, Params


def compact(
    fn: Callable[..., Any], params: Params, masks: Masks, *, only: Only = None
) -> tuple[Callable[..., Any], Params]:
    """Hold weights by the blocks that masks leave of them, and compute with those alone.

    ``jp.shrink`` makes a network narrower; this keeps its width and leaves out blocks of its
    weights. The masks have as many blocks left in each column of blocks: those of ``Blocks((128,
    128), axes=("in", "out"))`` with ``scope=per_output``. A product then gathers the blocks of its
    data that each column needs and is one batched product, in plain XLA, on every device. It works
    in any spelling: matrix products, ``einsum``, convolutions, layers stacked under ``scan``,
    weights that are transposed, reshaped, cast or sliced before.

    The sparse function traces ``fn`` anew for every shape of inputs, and ``jit``, ``grad``,
    ``vmap``, ``scan`` and ``jax.export`` work on it. Its gradient is that of the kept blocks, at
    the cost of the kept blocks. Where ``fn`` reads a weight otherwise too (a norm, an embedding),
    the whole weight is made for that, and a ``PruneWarning`` says so.

    Which way round a weight is used does not matter to what comes out; where a mask is balanced
    along both axes, it is read as `[..., in, out]`.

    A weight stays as it is, masked, where its matrix has fewer than 65,536 entries, or where
    ``share * (1 + 200 / bo)`` exceeds 0.8: what is left times the cost of gathering for blocks of
    ``bo`` outputs, measured on a CPU at 64 rows of data and more. At one row blocks gain sooner;
    ``only`` overrides it, and ``print(jp.compact_plan(...))`` shows the choice.

    Args:
      fn: function of params and inputs, of any library.
      params: the params, the tree that ``fn`` takes.
      masks: masks like the params, None for leaves without; subtrees may be left out.
      only: regexes over whole paths: exactly these weights are held by blocks. The others stay as
        they are, masked, whatever their masks are.

    Returns:
      ``(sparse_fn, sparse_params)``. ``sparse_params`` is a tree of the same structure, with
      blocks `[*lead, columns, kept, bi, bo]` in the place of weights, where leading axes count
      layers, experts, heads. Indices are constants of ``sparse_fn``. Blocks are read off the masks:
      the largest that fit, so that neighbours which all go together are one.

    Raises:
      TypeError: ``fn`` is no function of the params.
      ValueError: masks of single weights, blocks that do not divide an axis, columns that keep
        different numbers of blocks or none; nothing gains. When called: params of other shapes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxprune as jp
      >>> mlp = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
      >>> w = jax.random.normal(jax.random.key(0), (1024, 512))
      >>> params, x = {"w": w, "v": jnp.ones((512, 1))}, jnp.ones((4, 1024))
      >>> layout = jp.find_layout(mlp, params, x)
      >>> blocks = jp.patterns.Blocks((128, 128), axes=("in", "out"))
      >>> masks = jp.find_masks(params, 0.75, pattern=blocks, scope=jp.scopes.per_output,
      ...                       layout=layout, where=jp.by_path("w"))
      >>> sparse_fn, sparse_params = compact(mlp, params, masks)
      >>> sparse_params["w"].shape, sparse_fn(sparse_params, x).shape
      ((4, 2, 128, 128), (4, 1))

    References:
      Gray et al., `GPU Kernels for Block-Sparse Weights
      <https://cdn.openai.com/blocksparse/blocksparsepaper.pdf>`_, 2017.
    """
    check_call(fn, {}, compact)
    found = compaction_of(params, masks, only, "compact")
    return sparse_function(fn, found), found.params(params)


def compact_state(
    tx: optax.GradientTransformation,
    opt_state: optax.OptState,
    params: Params,
    masks: Masks,
    *,
    only: Only = None,
) -> optax.OptState:
    """Compact an optimizer state as ``compact`` does the params, to go on training their blocks.

    Nothing is left to mask: training goes on with the inner optimizer alone, whose moments are
    those of the kept blocks. Pass the state of the pruner, whatever it was. Weights that stayed as
    they are still have their masks, which ``tx = jp.hold(inner)`` keeps: with the inner optimizer
    alone they would come back, which is refused.

    Args:
      tx: the optimizer to go on with: the inner one, or ``jp.hold`` of it.
      opt_state: the state for the whole params, of ``tx`` or of a pruner around its inner one.
      params: the whole params, the tree that ``tx.init`` got.
      masks: the masks that ``compact`` got, of these params.
      only: as ``compact`` got it.

    Returns:
      The state for the sparse params.

    Raises:
      TypeError: an ``nnx.Optimizer`` instead of its ``opt_state``.
      ValueError: as for ``compact``; the state of other params, a pruner with events to come, an
        optimizer that keeps sums over axes; weights that stayed masked, and nobody to hold them.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> params = {"w": jax.random.normal(jax.random.key(0), (512, 512))}
      >>> masks = {"w": jnp.kron(jnp.eye(4), jnp.ones((128, 128))) > 0}
      >>> tx = optax.adam(0.1)
      >>> state = compact_state(tx, tx.init(params), params, masks)
      >>> state[0].mu["w"].shape
      (4, 1, 128, 128)
    """
    check_inner(tx, "compact_state")
    plain = without_variables(params)
    found = compaction_of(plain, masks, only, "compact_state")
    opt_state = _inner(tx, opt_state, plain)
    masked = leaves_by_path(found.masks, "compact_state")
    removing = [path for path, mask in masked.items() if not bool(jnp.all(mask))]
    if removing and not pruners(jax.eval_shape(tx.init, plain)):
        raise ValueError(
            f"`compact_state` would let removed weights of {list_paths(removing, 6)} come back: "
            f"they stay as they are ({found.dense[removing[0]]}), and this optimizer holds no "
            "masks. Go on with `tx = jp.hold(inner)`, or hold them by blocks, too, with `only`."
        )
    small = jax.eval_shape(found.params, plain)
    state = cut_state(tx, opt_state, plain, small, found.place, user="compact_state")
    _warn_of_shapes(tx, (opt_state, state), plain, found)
    return state


def _inner(
    tx: optax.GradientTransformation, opt_state: optax.OptState, params: Params
) -> optax.OptState:
    """The state without its pruners, where their inner optimizers go on alone."""
    if pruners(jax.eval_shape(tx.init, params)):
        return opt_state
    alone = lambda node: node.inner_state if is_pruner(node) else node  # noqa: E731
    return jax.tree.map(alone, opt_state, is_leaf=is_pruner)


def _warn_of_shapes(
    tx: optax.GradientTransformation,
    states: tuple[optax.OptState, optax.OptState],
    params: Params,
    found: Compaction,
) -> None:
    """Say where an optimizer treats blocks otherwise than the weights that they are of.

    What looks at a whole leaf, its axes or a mean over it, cannot know; an update of each tells.
    """
    whole, blocks = adopted(tx, without_variables(states[0]), params), without_variables(states[1])
    if not is_concrete((params, jax.tree.leaves((whole, blocks)))):
        return
    small = found.params(params)
    drawn = jax.tree.map(_drawn, small)
    try:
        want = found.params(tx.update(found.expand(drawn), whole, found.expand(small))[0])
        got = tx.update(drawn, blocks, small)[0]
    except (TypeError, ValueError, AttributeError, KeyError):  # it asks for more than gradients
        return
    told = []
    for (path, a), (_, b) in zip(leaves_with_path(want), leaves_with_path(got), strict=True):
        apart = jnp.max(jnp.abs(wide(a) - wide(b))) / jnp.max(jnp.abs(wide(a)))
        if path in found.forms and apart > 0.01:
            told.append(f"\n- {path!r}: by {float(apart):.0%} of its largest update")
    if told:
        warnings.warn(
            "`compact_state`: this optimizer moves blocks otherwise than the weights they are of"
            f"{''.join(told)}\nIt looks at whole arrays (their number of axes, a mean over them), "
            "which are others now. Let masks tell weights by their paths, and choose optimizers "
            "that work elementwise or by norms.",
            PruneWarning,
            stacklevel=3,
        )


def _drawn(p: Any) -> jax.Array:
    """Numbers like a parameter, all of them different."""
    return jnp.sin(jnp.arange(jnp.size(p))).reshape(jnp.shape(p)).astype(jnp.result_type(p))


def expand(sparse_params: Params, params: Params, masks: Masks, *, only: Only = None) -> Params:
    """Put kept blocks back into whole weights, with zeros for what was removed.

    Args:
      sparse_params: params that ``compact`` gave, or that were trained from them.
      params: the whole params, or their shapes.
      masks: the masks that ``compact`` got.
      only: as ``compact`` got it.

    Returns:
      Params of the shapes of the whole ones.

    Raises:
      ValueError: as for ``compact``, or blocks of other shapes than the masks leave.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((512, 512))}
      >>> masks = {"w": jnp.kron(jnp.eye(4), jnp.ones((128, 128))) > 0}
      >>> _, sparse_params = compact(lambda p, x: x @ p["w"], params, masks)
      >>> bool((expand(sparse_params, params, masks)["w"] == masks["w"]).all())
      True
    """
    return compaction_of(params, masks, only, "expand").expand(sparse_params)


def verify_compact(
    fn: Callable[..., Any],
    params: Params,
    masks: Masks,
    *inputs: Any,
    only: Only = None,
    **keywords: Any,
) -> float:
    """Measure how far the sparse function is from the masked one.

    Args:
      fn: function of params and inputs.
      params: the whole params.
      masks: masks, as for ``compact``.
      *inputs: inputs to compare on.
      only: as for ``compact``.
      **keywords: keyword arguments of ``fn``.

    Returns:
      The largest difference between outputs, as a fraction of the largest of them; infinite where
      one of them is not finite and the other is; at least 1 where integers differ.

    Raises:
      TypeError, ValueError: as for ``compact``.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((512, 512))}
      >>> masks = {"w": jnp.kron(jnp.eye(4), jnp.ones((128, 128))) > 0}
      >>> verify_compact(lambda p, x: x @ p["w"], params, masks, jnp.ones((2, 512)))
      0.0
    """
    check_call(fn, keywords, verify_compact)
    found = compaction_of(params, masks, only, "verify_compact")
    sparse_fn = sparse_function(fn, found)
    sparse = sparse_fn(found.params(params), *inputs, **keywords)
    masked = fn(apply_masks(params, masks_over(masks, params)), *inputs, **keywords)
    whole = [[None] * jnp.ndim(x) for x in jax.tree.leaves(masked)]
    return difference(masked, sparse, whole)


def sparse_function(fn: Callable[..., Any], found: Compaction) -> Callable[..., Any]:
    """Make the function that takes sparse params."""

    @functools.partial(jax.jit, static_argnums=1)
    def run(arrays: Sequence[Any], static: Any) -> Any:
        (params, *inputs), keywords = join_static(arrays, static)
        now = dataclasses.replace(found, whole=specs_beside(found.whole, params))
        program = trace(fn, now, inputs, keywords)
        seen: list[Seen] = []
        outs = evaluate(program, now, arrays, seen)
        _warn_of_whole(now, seen)
        return jax.tree.unflatten(jax.tree.structure(program.outputs), outs)

    def sparse_fn(params: Params, *inputs: Any, **keywords: Any) -> Any:
        _check_sparse(params, found)
        arrays, static = split_static(((params, *inputs), keywords))
        return run(arrays, static)

    return sparse_fn


def trace(
    fn: Callable[..., Any], found: Compaction, inputs: Sequence[Any], keywords: dict[str, Any]
) -> Program:
    """Trace the whole function on the shapes of its params."""
    return program_of(fn, (found.whole, *inputs), keywords, len(paths_of(found)))


def paths_of(found: Compaction) -> list[str]:
    """The paths of the arrays of the params, in order."""
    return [path for path, leaf in leaves_with_path(found.whole) if is_array(leaf)]


def evaluate(
    program: Program, found: Compaction, arrays: Sequence[Any], seen: list[Seen]
) -> list[Any]:
    """Evaluate a traced function on sparse params, the first of the arrays; note what happens."""
    values = list(arrays)
    for number, path in enumerate(paths_of(found)):
        if (form := found.forms.get(path)) is not None:
            index = jnp.asarray(form.index)
            values[number] = Blocked(values[number], index, form.axes, (number,))
    return Evaluation(seen.append).whole(program.closed, values)


def _warn_of_whole(found: Compaction, seen: Sequence[Seen]) -> None:
    """Say which weights are made whole because something else than a product reads them."""
    paths = paths_of(found)
    told = {
        f"{paths[leaf]!r}: {each.at} reads it"
        for each in seen
        if each.met is None
        for leaf in each.leaves
    }
    if told:
        listed = "".join(f"\n- {line}" for line in sorted(told))
        warnings.warn(
            f"`compact` makes whole weights of blocks where they are no operand of a product with "
            f"data, which costs time and memory:{listed}\nLeave them out with `only` if they are "
            "mostly read so; `print(jp.compact_plan(...))` lists all uses.",
            PruneWarning,
            stacklevel=3,
        )


def _check_sparse(params: Params, found: Compaction) -> None:
    """Refuse params of other shapes than the blocks that are left."""
    got: Any = jax.tree.structure(params)
    wanted: Any = jax.tree.structure(found.whole)
    if got != wanted:
        raise ValueError(
            f"The sparse function wants params of the structure {wanted}, but got {got}. Pass "
            "those that `jp.compact` gave, or that were trained from them."
        )
    wrong = []
    whole = leaves_with_path(found.whole)
    for (path, full), leaf in zip(whole, jax.tree.leaves(params), strict=True):
        form = found.forms.get(path)
        want = form.shape if form is not None else jnp.shape(full) if is_array(full) else None
        if want is not None and jnp.shape(leaf) != tuple(want):
            wrong.append(f"{path!r} has shape {jnp.shape(leaf)}, wanted {tuple(want)}")
    if wrong:
        raise ValueError(
            f"The sparse function got params that are not its own: {'; '.join(wrong[:6])}. Pass "
            "those that `jp.compact` gave, or that were trained from them."
        )
