"""A trained network pruned in one pass over calibration data, layer after layer."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxprune._advice import PruneWarning
from jaxprune._batches import Batches, read_batches
from jaxprune._calibrate import Changed, Visit, Walk, calibrate, walk_of
from jaxprune._errors import check_parts, check_sparsity, short
from jaxprune._help import readable
from jaxprune._keep import Keep
from jaxprune._layout import Layout
from jaxprune._masks import apply_masks, check_masks
from jaxprune._mesh import plain_mesh
from jaxprune._numbers import is_tree, plain
from jaxprune._parts import declared
from jaxprune._progress import bar
from jaxprune._prune_units import prune_units
from jaxprune._solve import moved, solver
from jaxprune._traced import Call, Traced, alive_in, few_rows, left_alone, trace
from jaxprune._tree import (
    align,
    is_matrix,
    leaves_by_path,
    list_paths,
    map_leaves,
    prunable,
)
from jaxprune._where import by_default
from jaxprune.graph._product import Product
from jaxprune.graph._products import Weight, stops_of
from jaxprune.patterns import Weights
from jaxprune.scopes import per_leaf, per_output
from jaxprune.typing import Masks, Method, Params, Pattern, Scope, Sparsity, Where


@readable
def prune_trained(
    fn: Callable[..., Any],
    params: Params,
    batches: Batches,
    sparsity: Sparsity,
    *,
    method: Method,
    pattern: Pattern = Weights(),
    scope: Scope | None = None,
    where: Where = is_matrix,
    within: Masks | None = None,
    layout: Layout | None = None,
    targets: Literal["pruned", "dense"] = "pruned",
    progress: bool = True,
) -> tuple[Params, Masks]:
    """Prune a trained network in one pass over calibration data, without training.

    Walks through ``fn(params, *batch)`` from its inputs on. Wherever a weight multiplies data it
    sums the Gram matrix of the inputs, as the layers before it, pruned already, make them now; the
    method finds mask and new values for the weight, and the walk goes on. That works on any
    traceable function: dots and convolutions of any spelling, weights that are rearranged first,
    stacks of layers under ``scan``, weights that are shared or used in every round of a loop over
    time, which are seen whole before they change. No batch is run twice but for those, and what
    lies in memory are the activations of one stretch and a Gram matrix or two.

    With ``jp.patterns.Coupled(groups)`` whole units go, neurons and heads: they are chosen where a
    weight reads them, the rest of that weight is refit to make up for them, and a bias behind it
    takes over their means. ``jp.shrink`` makes the network smaller then.

    A weight is pruned as the matrix `[inputs, outputs]` that it is in its product (of a convolution
    the inputs are the places of its window, the channels innermost). Pattern, scope and sparsity
    speak of that matrix: each is a competition of its own, and loses exactly
    ``round(sparsity * n)`` of its units. So does each group, as experts are, and each layer. Under
    ``per_output``, Wanda's scope, it is each output that does, of its inputs: of 9 inputs 4 at 0.5.

    Args:
      fn: function of params and inputs, in inference mode.
      params: the whole tree of variables. It is not changed.
      batches: a list of tuples of inputs, or of single arrays, all of one shape; or a function that
        gives a fresh iterator of them. 100,000 rows of data do for most networks.
      sparsity: fraction to remove: a number, or a tree of numbers, as ``jp.scopes.erk`` or
        ``jp.scopes.owl`` make; of stacks arrays `[layers]`.
      method: ``jp.methods.wanda``, ``ria``, ``sparsegpt``, ``admm``, or a function of one's own:
        ``(w [inputs, outputs], gram [inputs, inputs], *, keep) -> (w, mask)``. Settings are bound
        before: ``functools.partial(jp.methods.admm, damping=0.1)``.
      pattern: what is removed together.
      scope: who competes with whom; ``jp.scopes.windows(4)`` at 0.5 gives 2:4. By default that of
        the method: ``per_output`` for Wanda, the whole matrix for the others.
      where: which leaves are wanted; by default kernels, by their use.
      within: earlier masks, of these leaves or of any; what they remove stays removed.
      layout: what each axis means; found from ``fn`` unless it is given.
      targets: ``"pruned"`` lets a weight make of its inputs what it made of them; with ``"dense"``
        it is to make up for what the layers before it have lost: what the dense network has there,
        in the residual stream where it adds to one. One more forward pass. With a sparsity of 0
        and ``within`` it makes up for what earlier masks have removed, such as whole blocks. Whole
        units have it where no bias takes over their means.
      progress: show a bar, if ``tqdm`` is installed.

    Returns:
      New params, in which what is removed is exactly zero, and masks like ``params``: a bool array
      of the leaf's shape; where a leaf was left alone what ``within`` has of it, else None.

    Raises:
      TypeError: batches are an iterator that is gone once it has been read, or one array for all;
        ``fn`` is no function; params or batches are shapes, or traced by ``jax.jit``.
      ValueError: batches are not alike, no weight that is wanted multiplies data, a sparsity
        leaves nothing, a part does not fit a matrix, or activations are not finite: it says at
        which weight, and in which batch.

    Warns:
      PruneWarning: leaves that are wanted but left alone, with the reason (they are looked up, too,
        or go through a norm), fewer rows of data than inputs where Gram matrices are solved for,
        random numbers in ``fn``, or a sparsity that left nothing of a weight.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxprune as jp
      >>> net = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {n: jax.random.normal(k, (8, 8)) for n, k in zip(("up", "down"), keys)}
      >>> data = [jax.random.normal(keys[2], (64, 8))]
      >>> params, masks = prune_trained(net, params, data, 0.5, method=jp.methods.sparsegpt)
      >>> float(jp.sparsity(masks, params))
      0.5

    References:
      Frantar and Alistarh, `SparseGPT <https://arxiv.org/abs/2301.00774>`_, 2023; Sun et al.,
      `Wanda <https://arxiv.org/abs/2306.11695>`_, 2024.
    """
    user = "prune_trained"
    check_parts(user, method=method, where=where)
    _check_settings(targets, sparsity)
    data, shown = read_batches(batches, user), bar(user, shown=progress)
    call = Call(fn, params, data, layout, prune_trained)
    if declared(pattern, "owns"):
        settled = pattern.bind(params, where=where)  # type: ignore[attr-defined]
        return prune_units(
            call,
            settled,
            scope or per_leaf,
            sparsity,
            method,
            dense=targets == "dense",
            within=within,
            progress=shown,
        )
    traced = trace(call, where)
    part, whole = prunable(params, where=traced.where), traced.leaves
    earlier = None if within is None else check_masks(within, params, "within")
    if earlier is not None:
        params = apply_masks(params, earlier)
        traced = traced.on(params)
    scope = scope or (per_output if declared(method, "per_output") else per_leaf)
    of = functools.partial(Keep.of, pattern=pattern, scope=scope)
    keeps = _keeps(traced, _by_leaf(part, sparsity), of, earlier)
    dense = whole if targets == "dense" else None
    norms = declared(method, "diagonal") and dense is None
    measure = Product.squares if norms else Product.gram
    walk = walk_of(traced.line, traced.leaves, data.arrays, measure=measure, dense=dense)
    _warn(traced, walk, by_default(where), solved=not norms)
    solve, gone = solver(method, traced.name), []

    def visit(at: Visit) -> Changed:
        w = at.matrix if at.cross is None else moved(at.matrix, at.sums, at.cross)
        keep = keeps[at.weight]
        new, mask = solve(at, w, at.sums, keep)
        if not bool(mask.any()) and (keep.within is None or bool(keep.within.any())):
            gone.append(traced.name(at.weight))
        return new, mask

    stops = stops_of(traced.weights)
    calibrate(walk, stops, visit, name=traced.name, progress=shown)
    _warn_of_nothing(gone)
    return traced.results(params, walk), _masks(traced, walk, params, earlier)


def _masks(traced: Traced, walk: Walk, params: Params, earlier: Masks | None) -> Masks:
    """Masks of what was pruned; what is left alone stays removed as it was."""
    leaves = sorted({leaf for weight in traced.weights for leaf in weight.leaves})
    with plain_mesh():
        masks = traced.tree(params, {leaf: walk.mask(leaf) for leaf in leaves})
    if earlier is None:
        return masks
    return map_leaves(lambda _, new, old: old if new is None else new, params, masks, earlier)


# Settings.


def _check_settings(targets: Any, sparsity: Sparsity) -> None:
    if not (isinstance(targets, str) and targets in ("pruned", "dense")):
        raise ValueError(
            f"`prune_trained` got targets={short(targets)}. Use 'pruned', or 'dense' to make up "
            "for what earlier layers have lost."
        )
    if sparsity is None:
        raise TypeError("`prune_trained` got sparsity=None. Pass the fraction to remove: 0.5.")
    check_sparsity(sparsity)
    if any(np.max(np.asarray(s), initial=0) >= 1 for s in jax.tree.leaves(plain(sparsity))):
        raise ValueError(
            "`prune_trained` got a sparsity of 1, which leaves nothing of a weight. Use less, or "
            "leave the layer out by `jp.find_blocks` and `jp.shrink`."
        )


def _keeps(
    traced: Traced, numbers: dict[str, Any], of: Callable[..., Keep], within: Masks | None
) -> dict[Weight, Keep]:
    """What stays of each weight: pattern, scope and its own sparsity put together.

    ``numbers`` are the sparsities of leaves, ``of`` makes what keeps of a shape and a sparsity.
    """
    of = functools.lru_cache(maxsize=None)(of)
    alive = None if within is None else leaves_by_path(within, "prune_trained")
    found, wrong = {}, []
    for weight in traced.weights:
        try:
            keep = of(weight.product.of_matrix[-2:], _of_weight(traced, weight, numbers))
        except ValueError as error:
            wrong.append((traced.name(weight), str(error)))
            continue
        found[weight] = keep if alive is None else keep.among(alive_in(traced, weight, alive))
    if wrong:
        raise ValueError(
            f"`prune_trained` takes {wrong[0][0]!r} as a matrix `w` of inputs and outputs: "
            f"{wrong[0][1]}{_and_others([name for name, _ in wrong[1:]])}"
        )
    return found


def _and_others(paths: list[str]) -> str:
    return f" The same holds for {list_paths(paths, 6)}." if paths else ""


def _by_leaf(part: Params, sparsity: Sparsity) -> dict[str, Any]:
    """The sparsity of each leaf that is wanted, from a number or a tree."""
    wanted = leaves_by_path(part, "prune_trained")
    if not is_tree(sparsity):
        return dict.fromkeys(wanted, plain(sparsity))
    mirrored = align(sparsity, part)
    if mirrored is None:
        raise ValueError(
            "`prune_trained` got a tree of sparsities that does not mirror the leaves that are "
            f"wanted, {list_paths(list(wanted))}. Make it with `jp.scopes.uniform`, `erk`, `owl` "
            "or `custom` and the same `where` and `layout`."
        )
    return leaves_by_path(plain(mirrored), "prune_trained")


def _of_weight(traced: Traced, weight: Weight, numbers: dict[str, Any]) -> float:
    """The sparsity of one matrix; it has one."""
    found = []
    for part in weight.view.parts:
        number = np.asarray(numbers[traced.paths[part.leaf]])
        if number.ndim > len(part.layer):
            raise ValueError(
                f"it got sparsities of shape {number.shape} for layers that it does not have. Pass "
                "one number."
            )
        found.append(float(number[part.layer[: number.ndim]]))
    if len(set(found)) > 1:
        raise ValueError(
            f"it is made of leaves of different sparsities, {sorted(set(found))}. Pass one number "
            "for them."
        )
    return found[0]


def _warn(traced: Traced, walk: Walk, default: bool, *, solved: bool) -> None:
    """One warning for all that one should know before.

    ``solved`` says that Gram matrices are, so that few rows matter; norms can be had of one.
    """
    lines = []
    if alone := left_alone(traced, by_default=default):
        lines.append(f"it leaves alone:{alone}")
    if solved and (few := few_rows(traced, walk, traced.weights)):
        lines.append(few)
    if drawn := traced.draws():
        lines.append(f"`fn` draws random numbers in {drawn}: pass it in inference mode")
    if lines:
        listed = "".join(f"\n- {line}" for line in lines)
        warnings.warn(f"`prune_trained`:{listed}", PruneWarning, stacklevel=3)


def _warn_of_nothing(gone: Sequence[str]) -> None:
    """Say what a sparsity has left nothing of."""
    if gone:
        warnings.warn(
            f"`prune_trained` left nothing of {list_paths(list(gone), 6)}: that much of so few "
            "units is all of them. Use a lower sparsity there, or leave it out with `where`.",
            PruneWarning,
            stacklevel=3,
        )
