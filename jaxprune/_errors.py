"""Checks at the door, shared by everything that takes a sparsity or parts."""

import inspect
import math
import operator
from typing import Any

import jax
import numpy as np

from jaxprune._tree import leaves_with_path, list_paths


def check_sparsity(sparsity: Any, user: str = "sparsity", *, layers: bool = True) -> None:
    """Refuse numbers outside [0, 1], NaN, and what is no number. Traced values pass unseen.

    Unless ``layers`` is False, a leaf of a tree may be an array, with one for each layer.
    """
    bad = []
    for path, value in leaves_with_path(sparsity):
        if isinstance(value, jax.core.Tracer):
            continue
        where = f" at {path!r}" if path else ""
        number = isinstance(value, int | float | np.generic | np.ndarray | jax.Array)
        one_each = layers and np.ndim(value) > 0 and bool(path)
        if (np.ndim(value) and not one_each) or not number or is_bool(value):
            raise TypeError(
                f"`{user}` got {value!r}{where}. Pass the fraction to remove: one number in "
                "[0, 1], or a tree with one number for each prunable leaf."
            )
        fractions = np.ravel(np.asarray(value, float)).tolist()
        bad += [f"{x:g}{where}" for x in fractions if math.isnan(x) or not 0.0 <= x <= 1.0]
    if bad:
        raise ValueError(
            f"`{user}` got {', '.join(bad)}, outside [0, 1]. It is the fraction to remove: 0.9 "
            "keeps a tenth."
        )


def is_bool(value: Any) -> bool:
    """True for a bool of Python, NumPy or JAX, which counts as a number there."""
    return isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_


def whole(value: Any) -> int | None:
    """Give an integer of whatever make as one of Python; None for all else, bools included."""
    if is_bool(value):
        return None
    try:
        return operator.index(value)
    except TypeError:  # no integer, or one that is traced
        return None


def check_loss(loss: Any, user: str) -> Any:
    """Refuse a loss that is no scalar, while it is traced; give it back."""
    shapes = [getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(loss)]
    if shapes != [()]:
        raise TypeError(
            f"`{user}` got a `loss_fn` that returns {shapes or 'nothing'} instead of a scalar. "
            "Let it return the mean loss of the batch alone: `loss_fn(params, batch) -> []`."
        )
    return loss


def check_living(tree: Any, name: str = "masks") -> None:
    """Refuse arrays that a step took along because its arguments were donated."""
    gone = [
        path
        for path, leaf in leaves_with_path(tree)
        if isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)
        and leaf.is_deleted()
    ]
    if gone:
        raise ValueError(
            f"The arrays of `{name}` at {list_paths(gone, 6)} have been deleted: they were part of "
            "a state that was donated. Take them from the state that the step gave back, or copy "
            "them before it, as `jp.get_masks(opt_state)` does."
        )


# What to write instead, for each part.
_EXAMPLES = {
    "criterion": "`criterion=jp.criteria.taylor`",
    "pattern": "`pattern=jp.patterns.Channels(-1)` or `pattern=jp.patterns.Coupled(groups)`",
    "scope": "`scope=jp.scopes.across`",
    "where": "`where=jp.by_path('.*/kernel')`",
    "method": "`method=jp.methods.sparsegpt`",
}


def check_parts(user: str, **parts: Any) -> None:
    """Refuse what cannot play its role, such as ``criterion`` or ``scope``, before it is called."""
    for role, part in parts.items():
        fault = _fault(role, part)
        if fault:
            raise TypeError(f"`{user}` got {role}={short(part)}, {fault}")


def check_key(user: str, key: Any) -> None:
    """Refuse what is no random key; None is for those that need none."""
    typed = isinstance(key, jax.Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    words = getattr(key, "dtype", None) == np.uint32 and np.ndim(key) > 0
    if key is not None and not typed and not words:
        number = whole(key)
        raise TypeError(
            f"`{user}` got key={short(key)}, which is no random key. Pass "
            f"`key=jax.random.key({0 if number is None else number})`."
        )


def short(value: Any, most: int = 80) -> str:
    """A value for an error message, or its type where it takes too much space."""
    shown = repr(value)
    return shown if len(shown) <= most else f"<{type(value).__name__}>"


def _fault(role: str, part: Any) -> str:
    """Say why something cannot play a role, and what can; nothing where it may."""
    example = _EXAMPLES[role]
    if isinstance(part, str):
        like = f"`where=jp.by_path({part!r})`" if role == "where" else example
        return f"a string. Pass the part itself, such as {like}."
    if isinstance(part, type):
        return f"a class. Pass what it makes: `{part.__name__}(...)`, such as {example}."
    if role == "pattern":
        whole = hasattr(part, "pool") and hasattr(part, "expand")
        return "" if whole else f"which has no `pool` and `expand`. Pass {example}."
    if not callable(part):
        return f"which cannot be called. Pass a function, such as {example}."
    return _fault_of_call(role, part)


def _fault_of_call(role: str, f: Any) -> str:
    if role == "where" and not _takes(f, "path", None):
        return "which does not take a path and an array: it is called as `where(path, array)`."
    if role == "method" and not _takes(f, None, None, keep=None):
        return (
            "which is not called as `method(w, gram, keep=keep)`. Pass one of `jp.methods`, such "
            f"as {_EXAMPLES[role]}; criteria go to `jp.find_masks`."
        )
    # Scopes of a user may do without `within`; ours all take it.
    ours = str(getattr(f, "__module__", "")).startswith("jaxprune.")
    if role == "scope" and ours and not _takes(f, None, 0.5, within=None):
        return (
            "which makes scopes or sparsities. Call it, or pass a scope, such as "
            f"{_EXAMPLES[role]}."
        )
    return ""


def _takes(f: Any, *args: Any, **kwargs: Any) -> bool:
    """Say whether a function can be called like this; one that hides its arguments may be."""
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):  # a builtin
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
