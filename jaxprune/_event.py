"""Masks in a training step: what finds them, when, and the state that carries them along."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxprune._errors import check_key, check_parts, short
from jaxprune._evidence import check_evidence, check_names, criterion_name, required_evidence
from jaxprune._find import check_scope, find, fit_parts, rank
from jaxprune._frozen import Moving, frozen, without
from jaxprune._help import schedule_for
from jaxprune._masks import Packed, check_masks, pack, unpack
from jaxprune._mesh import bare, lay_out, true_over
from jaxprune._serial import serialize_tuple
from jaxprune._tree import (
    align,
    leaves_with_path,
    list_paths,
    map_leaves,
    mirrored,
    narrow,
    prunable,
    wide_dtype,
)
from jaxprune._where import by_default
from jaxprune.criteria import magnitude
from jaxprune.patterns import Coupled
from jaxprune.scopes._count import settle
from jaxprune.typing import Criterion, Masks, Params, Pattern, Schedule, Scope, Where


class PruneState(NamedTuple):
    """State of ``prune`` and ``hold``, and of all else that carries masks through training.

    Attributes:
      count: updates so far, int32 ``[]``.
      masks: the masks in force, or ``Packed`` bits; None where a leaf is not prunable.
      inner_state: state of the wrapped optimizer.
      criterion_state: what a criterion with memory remembers, else ``()``.
      key: random key for criteria that ask for one, else None.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count, which nobody calls here
    masks: Masks
    inner_state: optax.OptState
    criterion_state: Any
    key: jax.Array | None


serialize_tuple(PruneState)


@dataclasses.dataclass(frozen=True)
class Search:
    """The parts that decide which weights stay, put together for a training run.

    Attributes:
      user: the public function that was called, for messages.
    """

    user: str
    schedule: Schedule
    criterion: Criterion
    pattern: Pattern
    scope: Scope
    where: Where
    key: jax.Array | None
    inner: optax.GradientTransformation

    def __post_init__(self) -> None:
        if not callable(self.schedule) or not hasattr(self.schedule, "due"):
            raise TypeError(
                f"`{self.user}` got schedule={short(self.schedule)}, which cannot say when it is "
                f"due. {schedule_for(self.user, self.schedule)}"
            )
        parts = {"criterion": self.criterion, "pattern": self.pattern}
        check_parts(self.user, **parts, scope=self.scope, where=self.where)
        check_key(self.user, self.key)
        if self.key is None and "key" in required_evidence(self.criterion):
            raise TypeError(
                f"The criterion `{criterion_name(self.criterion)}` needs a random key and there "
                f"is no default. Pass `key=jax.random.key(...)` to `{self.user}`."
            )
        check_scope(self.scope, getattr(self.schedule, "final", None))

    @property
    def by_default(self) -> bool:
        """True if leaves are chosen by the default ``where`` alone."""
        return by_default(self.where) and not isinstance(self.pattern, Coupled)

    def on(self, params: Params, stored: Masks | None = None) -> "Search":
        """Settle what is pruned of these params, at ``init`` or with the masks of the state.

        What the inner optimizer freezes is left out by default. It is ``init`` that finds out,
        and masks say so from then on; only where they lack a leaf, it is looked at again.
        """
        if is_placeholder(params):
            return self
        search = self._over(params, self.where)
        missing = [] if stored is None else search._not_in(stored, params)
        if not by_default(self.where) or not (stored is None or missing):
            return search
        paths = frozen(self.inner, params)
        base = search.where if isinstance(self.pattern, Coupled) else self.where
        return self._over(
            params, without(base, missing if paths is None else paths, params, self.user)
        )

    def _over(self, params: Params, where: Where) -> "Search":
        pattern, where = fit_parts(self.pattern, where, params)
        return dataclasses.replace(self, pattern=pattern, where=where)

    def _not_in(self, stored: Masks, params: Params) -> list[str]:
        """What would be pruned, but masks say nothing of it."""
        marks = jax.tree.map(lambda _: True, stored, is_leaf=is_packed)
        have = dict(leaves_with_path(marks))
        part = prunable(params, where=self.where)
        return [path for path, _ in leaves_with_path(part) if path not in have]

    def first_masks(self, params: Params) -> Masks:
        """Make masks that keep all, of the shape that events find."""
        if is_placeholder(params):
            return params
        part = prunable(params, where=self.where)
        # The shapes say all that can go wrong: which masks come out, and whether any do.
        found = jax.eval_shape(
            lambda p: rank(
                p, self._sparsity(0, part), pattern=self.pattern, scope=self.scope, within=None
            ),
            bare(part),
        )
        return map_leaves(lambda p, mask: true_over(p, mask.shape), part, found)

    def first_memory(self, params: Params) -> Any:
        """Make what a criterion with memory starts from; ``()`` for all others."""
        if not hasattr(self.criterion, "init"):
            return ()
        if is_placeholder(params):
            return self.criterion.init(params)
        return self.criterion.init(prunable(params, where=self.where))

    def remember(self, memory: Any, params: Params, grads: Params) -> Any:
        """Take one step into the memory of the criterion."""
        if not hasattr(self.criterion, "init"):
            return memory
        part = prunable(params, where=self.where)
        update: Any = self.criterion.update  # type: ignore[attr-defined]
        return update(memory, part, narrow(grads, part))

    def evidence(self, state: PruneState, memory: Any, grads: Params, extra: Any) -> dict[str, Any]:
        """Collect all that a criterion may ask for at this step, and see that it is enough."""
        check_extra(self.user, self.inner, extra, self.criterion)
        evidence = {"grads": grads, **extra}
        if hasattr(self.criterion, "init"):
            evidence["state"] = memory
        if state.key is not None:
            evidence["key"] = jax.random.fold_in(state.key, state.count)
        check_evidence(self.criterion, evidence)
        return evidence

    def find(
        self, step: Any, params: Params, within: Masks | None, evidence: dict[str, Any]
    ) -> Masks:
        """Find the masks of an event."""
        part = prunable(params, where=self.where)
        return find(
            params,
            self._sparsity(step, part),
            evidence,
            criterion=self.criterion,
            pattern=self.pattern,
            scope=self.scope,
            where=self.where,
            within=within,
        )

    def falls(self, step: Any) -> jax.Array:
        """Say whether the schedule falls at an event, by more than the rounding of a float32."""
        schedule: Any = self.schedule
        before = schedule.before(step) if hasattr(schedule, "before") else step - 1
        drops = jax.tree.map(
            lambda now, then: jnp.any(now < then - 1e-6),
            schedule(step),
            schedule(jnp.maximum(before, 0)),
        )
        return jnp.any(jnp.stack(jax.tree.leaves(drops)))

    def fit(self, stored: Masks, params: Params) -> Masks:
        """Widen masks of somebody else's pattern to what this one finds."""
        part = prunable(params, where=self.where)
        masks = leaves_with_path(check_masks(unpack(stored), params, "masks"))
        wanted, held = ([path for path, _ in tree] for tree in (leaves_with_path(part), masks))
        if wanted != held:
            raise ValueError(
                f"`{self.user}` finds masks for {list_paths(wanted)}, but its state holds "
                f"masks for {list_paths(held)}. Put masks for all of them in with "
                "`jp.with_masks` (True keeps a weight), or leave leaves out with `where`."
            )
        return widen(stored, part, self.pattern)

    def _sparsity(self, step: Any, part: Params) -> Any:
        """Sparsity at a step, exact where it has arrived at the number that was asked for."""
        now, final = self.schedule(step), getattr(self.schedule, "final", None)
        if isinstance(self.where, Moving):  # a tree may have numbers for what is frozen, too
            now, final = narrow(now, part), narrow(final, part)
        return now if final is None else jax.tree.map(settle, now, final)


def searches(tx: Any) -> list[Search]:
    """Find the parts of all pruners in an optimizer, however deep they are nested.

    An optax transformation is a pair of functions, so they lie in what those have closed over.
    """
    found: dict[int, Any] = {}
    seen: set[int] = set()
    left = [tx]
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Search):
            found[id(part)] = part
        left += _inside(part)
    return list(found.values())


def _inside(part: Any) -> list[Any]:
    """What a function, a container or an object of optax holds."""
    if isinstance(part, list | tuple):
        return list(part)
    if isinstance(part, dict):
        return list(part.values())
    if isinstance(part, functools.partial):
        return [part.func, *part.args, *part.keywords.values()]
    if inspect.ismethod(part):
        return [part.__func__, part.__self__]
    if inspect.isfunction(part):
        return list(inspect.getclosurevars(part).nonlocals.values())
    return list(vars(part).values()) if type(part).__module__.startswith("optax") else []


def if_due(due: Any, renew: Callable[[Any], Any], stored: Any) -> Any:
    """Renew what is stored if it is due, else pass it on.

    A loop of at most one round instead of a conditional: XLA passes what does not change through
    a loop without copying it, and under vmap it still skips the search.
    """
    due = jnp.asarray(due, bool)

    def once(loop: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return jnp.zeros_like(loop[0]), renew(loop[1])

    return lax.while_loop(lambda loop: loop[0], once, (due, stored))[1]


def widen(stored: Masks, part: Params, pattern: Pattern) -> Masks:
    """Widen masks to the shape of those that a pattern finds among the prunable part."""
    keep = lambda p: jax.tree.map(lambda unit: unit > 0, pattern.pool(p))  # noqa: E731
    found = jax.eval_shape(lambda p: pattern.expand(keep(p), like=p), bare(part))
    shapes = [m.shape for m in jax.tree.leaves(stored, is_leaf=is_packed)]
    if shapes == [f.shape for f in jax.tree.leaves(found)]:
        return stored
    wide = map_leaves(
        lambda m, f: jnp.broadcast_to(m, jnp.broadcast_shapes(m.shape, f.shape)),
        check_masks(unpack(stored), part, "masks"),
        found,
    )
    return lay_out(wide, part)


def storage(packed: bool) -> Callable[[Masks], Masks]:
    """Say how masks lie in the state.

    Bits have no nnx variables around them: ``nnx.Optimizer`` gives it a variable for each array,
    and what it keeps of a node inside of a variable is no node any more.
    """
    return (lambda masks: pack(without_variables(masks))) if packed else lambda masks: masks


def without_variables(tree: Any) -> Any:
    """Take nnx variables from around arrays."""
    return jax.tree.map(
        lambda v: v.get_value() if _is_variable(v) else v, tree, is_leaf=_is_variable
    )


def _is_variable(node: Any) -> bool:
    """True for an nnx variable, known by what it can do: the core does not import flax."""
    return hasattr(node, "get_value") and hasattr(node, "set_value")


def live(grads: Params, masks: Masks) -> Params:
    """Zero the gradients of removed weights: what the inner optimizer gets to see."""
    return map_leaves(
        lambda g, m: g if m is None else jnp.where(m, g, jnp.zeros((), g.dtype)), grads, masks
    )


def enforce(update: jax.Array, param: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Make the update take removed weights to exactly zero."""
    if mask is None:
        return update
    # A narrow update cannot hold `-param` exactly, and then the sum would not be zero.
    dtype = common(update.dtype, param.dtype)
    return jnp.where(mask, update.astype(dtype), -param.astype(dtype))


def common(a: Any, b: Any) -> Any:
    """A type that holds the numbers of both; eight bits promote to nothing by themselves."""
    if a == b:
        return a
    return jnp.promote_types(*(wide_dtype(d) if _is_eight(d) else d for d in (a, b)))


def _is_eight(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 8


def is_placeholder(params: Any) -> bool:
    """True for what optax inits with to see which parts of a state mirror the params.

    It is a node without leaves, but none of the usual containers.
    """
    return not isinstance(params, dict | list | tuple | None) and not jax.tree.leaves(params)


def is_packed(node: Any) -> bool:
    """True for a mask in bits: for ``is_leaf``."""
    return isinstance(node, Packed)


def check_extra(user: str, inner: Any, extra: Any, criterion: Criterion = magnitude) -> None:
    """Refuse keywords of an update that nobody knows, unless the optimizer might."""
    if not isinstance(inner, optax.GradientTransformationExtraArgs):
        check_names(f"{user}(...).update", criterion, extra, ("value", "grad", "value_fn"))


def check_inner(inner: Any, user: str) -> None:
    """Refuse to wrap what is no optimizer."""
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"`{user}` wraps an optax optimizer, but got {inner!r}. Pass one, such as "
            "`optax.adam(1e-3)`."
        )


def check_grads(grads: Params, params: Params, part: Params) -> Params:
    """Give gradients the structure of the params, or say by path how they differ."""
    mirror = align(grads, params)
    if mirror is not None:
        _check_per_example(narrow(mirror, part), part)
    if mirror is None:
        return mirrored(grads, params, "grads")  # which says what is missing
    mirrored(narrow(mirror, part), part, "grads")  # whatever else may be None, these are needed
    return mirror


def _check_per_example(grads: Params, part: Params) -> None:
    """Refuse a gradient for each example with what takes them."""
    shapes = [jnp.shape(g) for g in jax.tree.leaves(grads)]
    wanted = [p.shape for p in jax.tree.leaves(part)]
    if wanted and [s[1:] for s in shapes if s] == wanted and shapes != wanted:
        raise ValueError(
            f"`grads` have a leading axis of {shapes[0][0]} that the params do not have: gradients "
            "of single examples, as `optax.contrib.dpsgd` takes them. Let them be averaged before "
            "the pruner: `optax.chain(optax.contrib.differentially_private_aggregate(...), "
            "jp.prune(optax.sgd(...), ...))`."
        )


def check_start(user: str, params: Params) -> None:
    """Refuse the pair of params that ``optax.lookahead`` trains."""
    if isinstance(params, optax.LookaheadParams):
        raise ValueError(
            f"`{user}` got the fast and the slow params of `optax.lookahead`, but gradients are "
            f"for the fast ones alone. Put it inside, `optax.lookahead(jp.{user}(...), ...)`, and "
            "mask both after each step, or each synchronization brings weights back: `params = "
            "optax.LookaheadParams(*(jp.apply_masks(p, jp.get_masks(state)) for p in params))`."
        )


def check_update(state: Any, params: Params | None, kind: type = PruneState) -> None:
    """Refuse an update without params, or with something else in the place of the state."""
    if not isinstance(state, kind):
        raise TypeError(
            f"`tx.update` got a {type(state).__name__} in the place of the state, a "
            f"`{kind.__name__}` that `tx.init(params)` makes. The order is "
            "`tx.update(grads, state, params)`."
        )
    inside: Any = getattr(state, "masked", state)  # what straight_through wraps
    masks = without_variables(inside.masks)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(masks)} - {"bool", "uint8"}
    if kinds:
        raise TypeError(
            f"The masks in the state have become {', '.join(sorted(kinds))}: something around the "
            "pruner blends its old and its new state by arithmetic, as `optax.contrib.sam` and "
            "`optax.lookahead(reset_state=True)` do, and zeros would not stay exact. Let the "
            "pruner be the outermost, `jp.prune(optax.contrib.sam(...), ...)`; sam with "
            "`opaque_mode=True` may be around it."
        )
    if params is None:
        raise ValueError(
            "`tx.update(grads, state)` was called without params, but masks are made from them and "
            "act on them. Call `tx.update(grads, state, params)`."
        )
