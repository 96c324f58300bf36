"""The laws of masks, as plain checks of what was found against slow NumPy."""

import jax
import numpy as np

from tests.contract.tables import CRITERIA, MEMORIES

ULPS = 8 * np.finfo(np.float32).eps  # pooled scores are sums of a few float32


def leaves(tree):
    """Prunable leaves by their simple names; None is left out."""
    return {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def mirror(params, masks):
    """Law 1: each mask is bool, of the parameter's rank, and broadcasts to it."""
    full = leaves(params)
    for path, m in leaves(masks).items():
        assert m.dtype == bool and m.ndim == full[path].ndim, path
        assert all(a in (1, b) for a, b in zip(m.shape, full[path].shape, strict=True)), path


def units(pattern, x):
    """List the entries of each unit of one leaf, and give the grid that the units form."""
    index = np.arange(x.size).reshape(x.shape)
    if pattern == "Weights":
        return index.reshape(-1, 1), x.shape
    if pattern == "Channels":
        return index.T, (1, x.shape[1])
    rows, columns = (-(-x.shape[0] // 2), -(-x.shape[1] // 4))
    blocks = [
        index[2 * i : 2 * i + 2, 4 * j : 4 * j + 4].ravel()
        for i in range(rows)
        for j in range(columns)
    ]
    return blocks, (rows, columns)


def competitions(scope, grids):
    """List the sets of units that compete, a unit being a path and a number."""
    everyone = {path: np.arange(np.prod(grid)).reshape(grid) for path, grid in grids.items()}
    if scope == "across":
        return [[(path, u) for path, ids in everyone.items() for u in ids.ravel()]]
    if scope == "windows":
        return [
            [(path, u) for u in ids[i : i + 4, j]]
            for path, ids in everyone.items()
            for i in range(0, ids.shape[0], 4)
            for j in range(ids.shape[1])
        ]
    if scope == "per_output":
        return [[(path, u) for u in column] for path, ids in everyone.items() for column in ids.T]
    return [[(path, u) for u in ids.ravel()] for path, ids in everyone.items()]


def remember(criterion, memory, params, grads):
    """Take one step into a slow memory, arrays by path; ``None`` starts it from zero."""
    if criterion not in MEMORIES:
        return None
    full, gradients = leaves(params), leaves(grads)
    memory = memory or {path: np.zeros_like(w) for path, w in full.items()}
    return {path: MEMORIES[criterion](m, full[path], gradients[path]) for path, m in memory.items()}


def slow_scores(criterion, part, grads, key, memory):
    """Score the prunable leaves, given by path in the order of the tree, in NumPy."""
    return {
        path: CRITERIA[criterion](
            w, grads[path], key, i, *([memory[path]] if criterion in MEMORIES else [])
        )
        for i, (path, w) in enumerate(part.items())
    }


def count_and_order(names, params, grads, key, sparsity, before, after, memory=None):
    """Laws 2 and 3: exactly as many units went as the law says, and the lowest of them.

    `sparsity` gives the number for a path; `before` are the masks handed in as `within`.
    """
    criterion, pattern, scope = names
    part = {path: w for path, w in leaves(params).items() if path in leaves(after)}
    was, now = leaves(before), leaves(after)
    scores = slow_scores(criterion, part, leaves(grads), key, memory)
    score, old, new, grids = {}, {}, {}, {}
    for path, w in part.items():
        s = np.asarray(scores[path], np.float64).ravel()
        members, grids[path] = units(pattern, w)
        alive = np.broadcast_to(was[path], w.shape).ravel()
        kept = np.broadcast_to(now[path], w.shape).ravel()
        score[path] = [s[m].mean() for m in members]
        old[path] = [alive[m].any() for m in members]
        new[path] = [kept[m].any() for m in members]
        for m in members:  # a unit dies as one
            assert (kept[m] == (alive[m] & kept[m].any())).all(), path
    for competition in competitions(scope, grids):
        n = len(competition)
        alive = [(p, u) for p, u in competition if old[p][u]]
        kept = [(p, u) for p, u in competition if new[p][u]]
        gone = [(p, u) for p, u in alive if not new[p][u]]
        asked = round(sparsity(competition[0][0]) * n)
        assert n - len(kept) == max(asked, n - len(alive)), (competition[0], asked, len(kept))
        if kept and gone:
            lowest, highest = min(score[p][u] for p, u in kept), max(score[p][u] for p, u in gone)
            assert highest <= lowest + ULPS * max(1.0, abs(lowest))


def monotone(before, after):
    """Law 4: nothing comes back."""
    now = leaves(after)
    for path, was in leaves(before).items():
        assert not (now[path] & ~was).any(), path


def zero(params, masks):
    """Law 5: exactly zero wherever a mask is False."""
    full = leaves(params)
    for path, m in leaves(masks).items():
        gone = ~np.broadcast_to(m, full[path].shape)
        assert (full[path].astype(np.float64)[gone] == 0.0).all(), path


def closed(before, after):
    """Law 8: a state keeps structure, shapes and dtypes."""
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def equal(before, after):
    """Masks that did not change."""
    for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        np.testing.assert_array_equal(a, b)


def asked(sparsity):
    """From a number or a tree of numbers to the number that counts at a path."""
    by_path = leaves(sparsity)
    return lambda path: float(by_path.get(path, by_path.get(())))
