"""The parts of a wrapper that finds masks while it trains: on which leaves, how much, and when."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._amount import Amount, OnTheWay
from jaxprune._checks import check_extra
from jaxprune._errors import check_key, short
from jaxprune._evidence import check_evidence, criterion_name, required_evidence
from jaxprune._find import among, choose, select
from jaxprune._frozen import Moving, frozen, without
from jaxprune._help import schedule_for
from jaxprune._masks import check_masks, is_packed, units_of, unpack
from jaxprune._mesh import all_true, is_explicit, reshard_like, shapes_of
from jaxprune._numbers import plain
from jaxprune._parts import Parts, declared
from jaxprune._ranking import Lazy, is_lazy
from jaxprune._score import lazy_scores, score
from jaxprune._state import is_placeholder
from jaxprune._tree import is_hole, leaves_with_path, list_paths, map_leaves, narrow, slots
from jaxprune._where import by_default
from jaxprune._wrap import First, Step, Store, at_most_once
from jaxprune.typing import Masks, Params, Schedule, Units


@dataclasses.dataclass(frozen=True)
class Pruner:
    """Parts with a schedule, as a public wrapper was given them.

    Attributes:
      parts: not bound to params yet; ``parts.user`` is the wrapper, for messages.
      schedule: how much, and when.
      key: for criteria that ask for one.
      inner: the wrapped optimizer, which may freeze leaves.
    """

    parts: Parts
    schedule: Schedule
    key: jax.Array | None
    inner: optax.GradientTransformation

    def __post_init__(self) -> None:
        user, criterion = self.parts.user, self.parts.criterion
        if not callable(self.schedule) or not hasattr(self.schedule, "due"):
            raise TypeError(
                f"`{user}` got schedule={short(self.schedule)}, which cannot say when it is "
                f"due. {schedule_for(user, self.schedule)}"
            )
        check_key(user, self.key)
        if self.key is None and "key" in required_evidence(criterion):
            raise TypeError(
                f"The criterion `{criterion_name(criterion)}` needs a random key and there "
                f"is no default. Pass `key=jax.random.key(...)` to `{user}`."
            )
        final = getattr(self.schedule, "final", None)
        check = declared(self.parts.scope, "check_sparsity")
        if check and final is not None:
            check(final, exact=False)

    @property
    def by_default(self) -> bool:
        """True if leaves are chosen by the default ``where`` alone."""
        return by_default(self.parts.where) and not self.parts.crosses_leaves

    def first(self, params: Params) -> First:
        """Make masks that keep all, and what the criterion remembers at the start."""
        start = getattr(self.parts.criterion, "init", None)
        if is_placeholder(params):
            return First(params, start(params) if start else ())
        bound = self.on(params)
        memory = start(bound.parts.shown(bound.part, bound.part)) if start else ()
        return First(bound.first_masks(), memory, bound.parts.block_of)

    def on(self, params: Params, stored: Masks | None = None) -> "Bound":
        """Settle what is pruned of these params, at ``init`` or with the masks of the state.

        What the inner optimizer freezes is left out by default. It is ``init`` that finds out,
        and masks say so from then on; only where they lack a leaf, it is looked at again.
        """
        bound = self._over(params, self.parts)
        missing = [] if stored is None else _paths_beside(bound.part, stored)
        if not by_default(self.parts.where) or not (stored is None or missing):
            return bound
        paths = frozen(self.inner, params)
        out = missing if paths is None else paths
        where = without(bound.parts.where, out, params, self.parts.user)
        return self._over(params, dataclasses.replace(self.parts, where=where)) if out else bound

    def evidence(self, now: Step, memory: Any) -> dict[str, Any]:
        """Collect all that a criterion may ask for at this step, and see that it is enough."""
        criterion, state = self.parts.criterion, now.state
        check_extra(self.parts.user, self.inner, now.extra, criterion)
        evidence = {"grads": now.grads, **now.extra}
        if hasattr(criterion, "init"):
            evidence["state"] = memory
        if state.key is not None:
            evidence["key"] = jax.random.fold_in(state.key, state.count)
        check_evidence(criterion, evidence)
        return evidence

    def _over(self, params: Params, parts: Parts) -> "Bound":
        bound = parts.bind(params)
        return Bound(bound, self.schedule, params, bound.prunable(params))


def _paths_beside(part: Params, stored: Masks) -> list[str]:
    """What would be pruned, but masks say nothing of it."""
    marks = jax.tree.map(lambda _: True, stored, is_leaf=is_packed)
    have = dict(leaves_with_path(marks))
    return [path for path, _ in leaves_with_path(part) if path not in have]


@dataclasses.dataclass(frozen=True)
class Bound:
    """A pruner on the params of one trace.

    Attributes:
      parts: bound to the params.
      schedule: how much, and when.
      params: all of them.
      part: the prunable leaves, None elsewhere.
    """

    parts: Parts
    schedule: Schedule
    params: Params
    part: Params

    def first_masks(self) -> Masks:
        """Make masks that keep all, of the shape that events find."""
        # The shapes say all that can go wrong: which masks come out, and whether any do.
        found = jax.eval_shape(
            lambda p: select(self.parts, p, self.amount(0), None, like=p), shapes_of(self.part)
        )
        return map_leaves(lambda p, mask: all_true(p, mask.shape), self.part, found)

    def amount(self, step: Any) -> Amount:
        """How much goes at a step: exactly what was asked for from when the schedule is there."""
        now, final = self.schedule(step), getattr(self.schedule, "final", None)
        if isinstance(self.parts.where, Moving):  # a tree may have numbers for frozen leaves, too
            now, final = narrow(now, self.part), narrow(final, self.part)
        if final is None:
            return self.parts.of_units(now, self.part)
        there = jax.tree.map(
            lambda n, f: jnp.all(n == jnp.asarray(f, jnp.result_type(n))), now, final
        )
        arrived = jnp.all(jnp.stack(jax.tree.leaves(there)))
        final, now = (self.parts.of_units(s, self.part) for s in (plain(final), now))
        return OnTheWay(arrived, final, now)

    def falls(self, step: Any) -> jax.Array:
        """Say whether the schedule falls at an event, by more than the rounding of a float32."""
        before = declared(self.schedule, "before")
        last = before(step) if before else step - 1
        drops = jax.tree.map(
            lambda now, then: jnp.any(now < then - 1e-6),
            self.schedule(step),
            self.schedule(jnp.maximum(last, 0)),
        )
        return jnp.any(jnp.stack(jax.tree.leaves(drops)))

    def renewed(
        self,
        step: jax.Array,
        stored: Masks,
        evidence: dict[str, Any],
        store: Store,
        *,
        falls: jax.Array | None = None,
    ) -> Masks:
        """Find the masks of an event, if there is one at this step.

        Args:
          step: updates so far.
          stored: the masks in force, as they lie in the state.
          evidence: for the criterion.
          store: puts masks into the form of the state.
          falls: whether removed weights may come back, bool `[]`; None if they always may.

        Returns:
          Masks like ``stored``.
        """
        due = self.schedule.due(step)
        scores = None
        if self.parts.keeps_lazily and not is_explicit(self.part):
            scores = lazy_scores(self.parts, self.part, self.params, evidence)
        if scores is None:  # a pass over the weights at least, and so for events only

            def renew(stored: Masks) -> Masks:
                scores = score(self.parts, self.part, self.params, evidence)
                alive = None if falls is None else self.alive(stored, falls)
                within = None if falls is None or alive is not None else _living(stored, falls)
                amount = self.amount(step)
                masks = select(self.parts, scores, amount, within, like=self.part, alive=alive)
                return store(masks, stored)

            return at_most_once(due, renew, stored)
        # The search is settled before it starts where nothing is due, and so needs nothing around
        # it that would carry, and copy, what it reads; what is left for the loop is to compare.
        within = None if falls is None else lazy_masks(stored, self.part, _living, falls)
        masks = choose(
            self.parts, scores, self.amount(step), within, like=self.part, due=jnp.asarray(due)
        )

        def compare(stored: Masks) -> Masks:
            earlier = jax.tree.map(lambda _: None, masks, is_leaf=is_lazy)
            if falls is not None:
                earlier = as_tree(_living(stored, falls), self.part)
            new = map_leaves(lambda _, new, old: among(new, old), self.part, masks, earlier)
            return store(new, stored)

        return at_most_once(due, compare, stored)

    def alive(self, stored: Masks, falls: jax.Array) -> Units | None:
        """The units that may be kept, read off bits that are units; None where weights tell.

        So blocks are ranked among those alive, and no mask of the size of the weights is made.
        """
        bits = jax.tree.leaves(stored, is_leaf=is_packed)
        blocks = [self.parts.block_of(s) for s in slots(self.part) if not is_hole(s.leaf)]
        of_units = (
            is_packed(m) and m.block and m.block == b for m, b in zip(bits, blocks, strict=True)
        )
        if not all(of_units):
            return None
        return as_tree([units_of(packed) | falls for packed in bits], self.part)

    def widened(self, stored: Masks) -> Masks:
        """Widen masks of somebody else's pattern to what this one finds."""
        masks = leaves_with_path(check_masks(unpack(stored), self.params, "masks"))
        wanted, held = ([path for path, _ in tree] for tree in (leaves_with_path(self.part), masks))
        if wanted != held:
            raise ValueError(
                f"`{self.parts.user}` finds masks for {list_paths(wanted)}, but its state holds "
                f"masks for {list_paths(held)}. Put masks for all of them in with "
                "`jp.with_masks` (True keeps a weight), or leave leaves out with `where`."
            )
        return widen(stored, self.part, self.parts)

    def remember(self, memory: Any, grads: Params) -> Any:
        """Take one step into the memory of the criterion, if it has one."""
        criterion: Any = self.parts.criterion
        if not hasattr(criterion, "init"):
            return memory
        part, beside = (
            self.parts.shown(x, self.part) for x in (self.part, narrow(grads, self.part))
        )
        return criterion.update(memory, part, beside)


def widen(stored: Masks, part: Params, parts: Parts) -> Masks:
    """Widen masks to the shape of those that a pattern finds among the prunable part.

    Masks that were put in may be full where the pattern makes `[1, channels]`; in the loop of an
    event both have to be alike.
    """
    keep = lambda p: jax.tree.map(lambda unit: unit > 0, parts.pool(p))  # noqa: E731
    found = jax.eval_shape(lambda p: parts.expand(keep(p), like=p), shapes_of(part))
    shapes = [m.shape for m in jax.tree.leaves(stored, is_leaf=is_packed)]
    if shapes == [f.shape for f in jax.tree.leaves(found)]:
        return stored
    wide = map_leaves(
        lambda m, f: jnp.broadcast_to(m, jnp.broadcast_shapes(m.shape, f.shape)),
        check_masks(unpack(stored), part, "masks"),
        found,
    )
    return reshard_like(wide, part)


def _living(stored: Masks, falls: jax.Array) -> Masks:
    """What may be kept: what is, or all while the schedule falls."""
    return jax.tree.map(lambda m: m | falls, unpack(stored))


def as_tree(masks: Masks, like: Any) -> Masks:
    """The same masks in a tree like another one: bits have no nnx variables around them."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(masks))


def lazy_masks(stored: Masks, part: Params, read: Callable[..., jax.Array], *beside: Any) -> Masks:
    """Masks as they lie in a state, in a tree like ``part``, to be unpacked where they are read.

    Args:
      stored: masks or bits.
      part: the prunable leaves.
      read: from what is stored of a leaf, and ``beside``, to bools.
      *beside: arrays.
    """
    leaves = jax.tree.leaves(stored, is_leaf=is_packed)
    lazy = [Lazy((leaf, *beside), read, jnp.dtype(bool)) for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(part), lazy)


def pruners_in(tx: Any) -> list[Pruner]:
    """Find the pruners of an optimizer, however deep they are nested.

    An optax transformation is a pair of functions, so they lie in what those have closed over.
    """
    found: dict[int, Pruner] = {}
    seen: set[int] = set()
    left = [tx]
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Pruner):
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
