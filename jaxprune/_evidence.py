"""What criteria ask for by keyword: which names there are, which are functions, what is missing."""

import difflib
import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxprune import criteria
from jaxprune.typing import Criterion

# What people call a setting elsewhere.
_OTHER_NAMES = {"seed": "key", "rng": "key", "mask": "within", "masks": "within", "loss": "loss_fn"}


def is_function(name: str) -> bool:
    """True for evidence that is a function of the params: `loss_fn`, `apply_fn`.

    Its name says so, since a tree of params may be callable as well.
    """
    return name.endswith("_fn")


def check_names(
    user: str, criterion: Criterion, names: Iterable[str], settings: tuple[str, ...] = ()
) -> None:
    """Refuse keywords that nobody knows: they are settings misspelled.

    What any criterion of ours names may be handed to every other; one that takes `**name` with a
    name of its own takes all.
    """
    arguments = _arguments(criterion)
    if any(p.kind is p.VAR_KEYWORD and p.name != "_" for p in arguments) or not arguments:
        return
    known = [*settings, *(p.name for p in arguments[1:] if p.name != "_"), *_evidence()]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise TypeError(
            f"`{user}` got {', '.join(f'`{name}=`' for name in unknown)}, which is no setting of "
            f"it, and no criterion asks for it. {_nearest(unknown[0], known)}"
        )


def _nearest(name: str, known: list[str]) -> str:
    other = _OTHER_NAMES.get(name)
    close = [other] if other in known else difflib.get_close_matches(name, known, 1)
    if close:
        return f"Did you mean `{close[0]}=`?"
    return f"There are {', '.join(f'`{k}`' for k in dict.fromkeys(known))}."


@functools.cache
def _evidence() -> tuple[str, ...]:
    """All that the criteria of this library ask for."""
    found = [getattr(criteria, name) for name in criteria.__all__]
    named = [p.name for c in found for p in _arguments(c) if p.kind is p.KEYWORD_ONLY]
    return tuple(name for name in named if name != "layout")  # a setting, beside the evidence


def check_data(evidence: Mapping[str, Any], user: str) -> None:
    """Refuse functions under a name that is not one of a function."""
    for name, value in evidence.items():
        if callable(value) and jax.tree_util.treedef_is_leaf(jax.tree.structure(value)):
            raise TypeError(
                f"`{user}` got the function `{name}`. Functions of the params go by a name that "
                f"ends in `_fn`, all else is data: let the criterion ask for `{name}_fn`."
            )


def check_evidence(criterion: Criterion, evidence: Iterable[str]) -> None:
    """Refuse to call a criterion with what it cannot take, or without what it asks for."""
    given = list(evidence)
    surplus = [name for name in given if not _takes(criterion, name)]
    if surplus:
        raise TypeError(
            f"The criterion `{criterion_name(criterion)}` takes no "
            f"{', '.join(f'`{name}`' for name in surplus)}. End its arguments with `**_` to "
            "swallow what it does not need; if it makes criteria, such as `fisher_ema`, call it."
        )
    missing = [name for name in required_evidence(criterion) if name not in given]
    if missing == ["state"] and hasattr(criterion, "init"):
        raise TypeError(
            f"The criterion `{criterion_name(criterion)}` ranks by what it remembers of training, "
            "and here it has not seen any. Use it in `jp.prune` or `jp.straight_through`, which "
            "keep its memory; by hand, `criterion.init(params)` and `criterion.update(state, "
            "params, grads)` at every step make the `state=` to pass."
        )
    if "keep" in missing:  # methods are called as (w, gram, *, keep)
        raise TypeError(
            f"`{criterion_name(criterion)}` asks for `keep` as methods do, which prune a matrix. "
            "Pass it as `method=` to `jp.prune_trained`, or a criterion, such as "
            "`criterion=jp.criteria.wanda`."
        )
    if missing:
        asked = ", ".join(f"`{name}`" for name in missing)
        first = missing[0]
        raise TypeError(
            f"The criterion `{criterion_name(criterion)}` needs {asked}, which was not given. Pass "
            f"`{first}=...` to `jp.find_masks`, or to `tx.update` inside a training step; `jp.imp` "
            "gets it from `evidence=`."
        )


def split_functions(
    user: str, criterion: Criterion, evidence: Mapping[str, Any]
) -> tuple[tuple[tuple[str, Any], ...], dict[str, Any]]:
    """Take evidence apart into functions of the params, which are static, and data."""
    check_evidence(criterion, evidence)
    functions = tuple((name, evidence[name]) for name in sorted(evidence) if is_function(name))
    data = {name: value for name, value in evidence.items() if not is_function(name)}
    check_data(data, user)
    return functions, data


def named_evidence(criterion: Criterion, offered: Iterable[str]) -> list[str]:
    """What of the evidence a criterion asks for by name, or takes whatever its name."""
    arguments = _arguments(criterion)
    names = {p.name for p in arguments}
    takes_all = any(p.kind is p.VAR_KEYWORD and p.name != "_" for p in arguments) or not arguments
    return [name for name in offered if takes_all or name in names]


def asks_for_layout(criterion: Criterion) -> bool:
    """True for a criterion that names ``layout``: it is given it, and minds stacks itself."""
    return any(p.name == "layout" for p in _arguments(criterion))


def required_evidence(criterion: Criterion) -> list[str]:
    """Names of the keyword-only arguments without default."""
    arguments = [p for p in _arguments(criterion) if p.name != "layout"]  # which is always offered
    return [p.name for p in arguments if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def _takes(criterion: Criterion, name: str) -> bool:
    arguments = _arguments(criterion)
    return not arguments or any(p.kind is p.VAR_KEYWORD or p.name == name for p in arguments)


def _arguments(criterion: Criterion) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(criterion).parameters.values())
    except (TypeError, ValueError):  # a builtin or a wrapper that hides them
        return []


def criterion_name(criterion: Criterion) -> str:
    """The name of a criterion for people."""
    return getattr(criterion, "__name__", None) or type(criterion).__name__
