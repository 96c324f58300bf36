"""Which operations of a program cannot be exported, found by exporting each of them alone."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxprune.export._fold import equations
from jaxprune.export._products import bind


def culprits(
    jaxpr: core.Jaxpr, attempt: Callable[[Callable[..., Any], Sequence[Any]], Any], error: Exception
) -> str:
    """Name what ``attempt(fn, specs)`` fails for, and where it is called.

    If some are in the words of the error, these are the reason; others may fail for being alone.
    """
    found: dict[str, str] = {}
    tried: set[str] = set()
    for eqn, line in equations(jaxpr):
        name = eqn.primitive.name
        same = f"{name} {[str(v.aval) for v in eqn.invars]} {eqn.params}"
        if name not in found and same not in tried and not _goes(eqn, attempt):
            found[name] = f"`{name}` at {line or 'an unknown line'}"
        tried.add(same)
    named = [words for name, words in found.items() if name in str(error)]
    return ", ".join(named or found.values()) or "this function"


def _goes(eqn: core.JaxprEqn, attempt: Callable[..., Any]) -> bool:
    free = [v for v in eqn.invars if isinstance(v, core.Var)]

    def alone(*values: Any) -> tuple[Any, ...]:
        left = iter(values)
        taken = [next(left) if isinstance(v, core.Var) else v.val for v in eqn.invars]
        return tuple(bind(eqn, taken))

    try:
        avals: Any = [v.aval for v in free]
        attempt(alone, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals])
    except Exception:
        return False
    return True
