"""The walk over a program on calibration data, which changes weights where they meet it."""

# A network is pruned from its inputs on, each weight on what those before it make now:
#
#     run all batches up to a stop          activations of one stretch are what lies in memory
#     sum the Gram matrix of the inputs     one for weights that meet the same data: q, k, v
#     visit the weights: (w, gram) -> (w, mask)
#     go on from there, on the new weights
#
# What is used several times (shared layers, loops over time) is seen whole before it changes: its
# stretch is run for the sums alone, and then again. With `dense` a second world goes along, in
# which nothing was changed.

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune._mesh import laid_as, on_its_mesh, plain_axes, plain_mesh
from jaxprune.graph._behind import Bias, residual
from jaxprune.graph._collect import Measure, evaluate_loop, read_view, stretch
from jaxprune.graph._frames import Value
from jaxprune.graph._line import Line, Ref
from jaxprune.graph._linear import Part, View
from jaxprune.graph._product import Product
from jaxprune.graph._products import Place, Stop, Weight

Chunks: TypeAlias = list[Value]  # of one value that of each batch
Changed: TypeAlias = tuple[jax.Array, jax.Array]  # the new matrix, and its mask


class Visit(NamedTuple):
    """What is known of a weight when the walk has reached it.

    Attributes:
      weight: where it is used.
      matrix: `[groups?, inputs, outputs]`, as it is now.
      sums: the Gram matrix of its inputs, `[groups?, inputs, inputs]`, or the diagonal of that.
      cross: inputs times what the dense model makes of it, `[inputs, outputs]`, if that was asked
        for and there is such a thing.
    """

    weight: Weight
    matrix: jax.Array
    sums: jax.Array
    cross: jax.Array | None


@dataclasses.dataclass
class World:
    """Values of a program on all batches, with weights as they are in it.

    Attributes:
      leaves: the parameters, as they were.
      flows: of what depends on data, the values that somebody will still read.
      fixed: of what does not, likewise.
      changed: parameters, or layers of them, that are not what they were.
      masks: of those what stays, likewise.
    """

    leaves: Sequence[jax.Array]
    flows: dict[Ref, Chunks]
    fixed: dict[Ref, Value] = dataclasses.field(default_factory=dict)
    changed: dict[Part, jax.Array] = dataclasses.field(default_factory=dict)
    masks: dict[Part, jax.Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Walk:
    """A program, its data, and how far one is.

    Attributes:
      line: the program.
      worlds: that in which weights are changed; and the dense one, if it is wanted.
      measure: what is summed where weights meet data.
      last: the last step that reads a value.
      batches: how many there are.
      start: the first step that has not been evaluated.
      compiled: programs of stretches and sums, by form.
    """

    line: Line
    worlds: list[World]
    measure: Measure
    last: dict[Ref, int]
    batches: int
    start: int = 0
    compiled: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    def part(self, world: World, part: Part) -> jax.Array:
        """A parameter, or a layer of it, as it is now."""
        if part in world.changed:
            return world.changed[part]
        x = world.leaves[part.leaf]
        depth = len(part.layer)
        if any(p.leaf == part.leaf and p.layer[:depth] == part.layer for p in world.changed):
            n = x.shape[depth]
            rows = [self.part(world, part._replace(layer=(*part.layer, i))) for i in range(n)]
            with on_its_mesh(rows[0]):
                return jnp.stack(rows)
        with on_its_mesh(x):
            return x[part.layer] if part.layer else x

    def matrix(self, world: World, view: View, product: Product) -> jax.Array:
        """A weight as it is now, `[groups?, inputs, outputs]`."""
        return product.matrix(read_view(view, lambda p: plain_axes(self.part(world, p))))

    def read(self, world: World, ref: Ref, chunk: int) -> Value:
        """A value, in one batch."""
        if ref in self.line.views:
            return read_view(self.line.views[ref], lambda p: self.part(world, p))
        if ref in self.line.known:
            return self.line.known[ref]
        return world.fixed[ref] if ref in world.fixed else world.flows[ref][chunk]

    def run(self, start: int, stop: int, world: World, *, free: bool = True) -> None:
        """Evaluate steps on all batches; of what they make keep what is read later."""
        line, moving = self.line, []
        for step in line.steps[start:stop]:
            if (step.outs and step.outs[0] in line.data) or (step.at and step.at.eqn.effects):
                moving.append(step)
            elif not all(o in world.fixed for o in step.outs):
                values = [self.read(world, i, 0) for i in step.ins]
                world.fixed.update(zip(step.outs, step.run(*values), strict=True))
        made = {o for step in moving for o in step.outs}
        ins = list(dict.fromkeys(i for step in moving for i in step.ins if i not in made))
        outs = [o for step in moving for o in step.outs if self.last.get(o, -1) >= stop]
        flowing = [i for i in ins if i in world.flows]
        still = {i: self.read(world, i, 0) for i in ins if i not in world.flows}
        done = [r for r in world.flows if free and self.last.get(r, -1) < stop]
        compiled = stretch(moving, ins, outs, self.compiled, line.types)
        results: dict[Ref, Chunks] = {o: [] for o in outs}
        for chunk in range(self.batches if moving else 0):
            here = {i: world.flows[i][chunk] for i in flowing}
            for r in done:  # read for the last time: one batch goes as the next comes
                world.flows[r][chunk] = None
            # One batch at a time: else all are under way at once, and hold what they need.
            found = jax.block_until_ready(
                compiled(*(here[i] if i in here else still[i] for i in ins))
            )
            for o, value in zip(outs, found, strict=True):
                results[o].append(value)
        for r in done:
            del world.flows[r]
        world.flows.update(results)
        if free:
            world.fixed = {r: v for r, v in world.fixed.items() if self.last.get(r, -1) >= stop}

    @plain_mesh()
    def sums(self, place: Place, world: World, chunks: Sequence[int]) -> jax.Array:
        """What is measured at a place outside of loops, over some batches."""
        product, measure = place.product, self.measure
        form = ("sums", product.of_data, product.kind)
        data = ([plain_axes(self.read(world, r, c)) for r in place.data] for c in chunks)
        return self._total(form, lambda *x: measure(product, *x), data)

    def loop_sums(self, number: int, world: World, chunks: Sequence[int]) -> list[jax.Array]:
        """What is measured at all places of a loop, over its rounds and some batches."""
        step, measure = self.line.steps[number], self.measure
        form = ("loop", step.form, tuple(tuple(sorted(line.views)) for line in step.loops))
        data = ([self.read(world, i, c) for i in step.ins] for c in chunks)
        found = self._total(form, lambda *x: evaluate_loop(step, x, measure).sums, data)
        return [plain_axes(x) for x in found]

    def _total(self, form: Hashable, f: Callable[..., Any], chunks: Iterable[Any]) -> Any:
        """Sum what a function makes of batches; it is compiled once for each form."""
        if form not in self.compiled:
            self.compiled[form] = jax.jit(f)
        total = None
        for chunk in chunks:
            one = self.compiled[form](*chunk)
            total = one if total is None else jax.tree.map(_add, total, one)
        return jax.block_until_ready(total)

    def rows(self, weight: Weight) -> int | None:
        """How many rows of inputs a weight has met; None where a loop makes them."""
        found = 0
        for place in weight.places:
            if place.order is not None:
                return None
            x = self.line.types[place.data[0]]
            spec = jax.eval_shape(place.product.rows, jax.ShapeDtypeStruct(x.shape, x.dtype))
            found += spec.shape[-2] * self.batches
        return found

    def leaf(self, leaf: int) -> jax.Array:
        """A parameter as it has become; its layers, which are a copy, are let go."""
        world = self.worlds[0]
        whole = self.part(world, Part(leaf))
        for part in [p for p in world.changed if p.leaf == leaf]:
            del world.changed[part]
        world.changed[Part(leaf)] = whole
        return whole

    def mask(self, leaf: int, index: tuple[int, ...] = ()) -> jax.Array:
        """What stays of a parameter, or of a layer of it; all of what nobody changed."""
        world = self.worlds[0]
        masks, shape = world.masks, world.leaves[leaf].shape[len(index) :]
        if (part := Part(leaf, index)) in masks:
            return masks[part]
        deeper = any(p.leaf == leaf and p.layer[: len(index)] == index for p in masks)
        if not deeper:
            return jnp.ones(shape, bool)
        return jnp.stack([self.mask(leaf, (*index, i)) for i in range(shape[0])])

    def outputs(self) -> list[list[Value]]:
        """Of each batch the results, once all weights have been changed."""
        world = self.worlds[0]
        self.run(self.start, len(self.line.steps), world)
        return [[self.read(world, o, c) for o in self.line.outs] for c in range(self.batches)]

    def _measured(self, number: int, place: Place, world: World, path: str) -> Any:
        """What is measured over all batches, which has to be finite."""
        inside = functools.partial(self.loop_sums, number, world)
        measure = inside if place.order is not None else functools.partial(self.sums, place, world)
        every = range(self.batches)
        found = measure(every)
        if not _finite(found):
            bad = next((chunk for chunk in every if not _finite(measure([chunk]))), 0)
            raise ValueError(
                f"The data that {path!r} multiplies is not finite in batch {bad}. Is that batch in "
                "order? A network that overflows in its dtype does so here, too."
            )
        return found

    def gather(self, stop: Stop, name: Callable[[Weight], str]) -> dict[Weight, jax.Array]:
        """What is measured of the weights of a stop, in the world that changes."""
        found: dict[Weight, jax.Array] = {}
        world = self.worlds[0]
        if stop.end > stop.step:  # seen whole first, on values of their own
            world = dataclasses.replace(world, flows=dict(world.flows), fixed=dict(world.fixed))
        kept: dict[Hashable, Any] = {}
        before = stop.step
        for number, weight, place in _in_order(stop.weights):
            if stop.end > stop.step:
                self.run(before, number, world, free=False)
                before = number
            loop = place.order is not None
            key = (number,) if loop else (place.data, place.product.of_data)
            if key not in kept:
                kept[key] = self._measured(number, place, world, name(weight))
            mine = kept[key][place.order] if loop else kept[key]
            found[weight] = mine if weight not in found else _sum(found[weight], mine)
        return found

    def cross(self, place: Place, outputs: int, kept: dict[Hashable, Any]) -> jax.Array | None:
        """Inputs now times what the dense model makes of its own, `[groups?, inputs, outputs]`.

        Where the product goes into a residual stream, what the stream lacks belongs to it.

        Args:
          place: the product.
          outputs: how many there are at this stop of the same data.
          kept: inputs now times dense inputs, by what they are of: of this stop.
        """
        product = place.product
        if len(self.worlds) < 2 or place.order is not None or product.kind == "ragged":
            return None
        now, dense = self.worlds
        stream = residual(self.line, place)
        if stream is not None and (stream not in now.flows or stream not in dense.flows):
            stream = None
        w = self.matrix(dense, place.view, product).astype(jnp.float32)
        both = [[plain_axes(x) for x in world.flows[place.data[0]]] for world in self.worlds]
        gap = [None] * self.batches if stream is None else self._gap(stream)
        if w.shape[-2] > 2 * outputs:  # through the outputs it takes fewer operations
            return self._over("cross", product, zip(*both, gap, [w] * self.batches, strict=True))
        key = (place.data, product.of_data)
        if key not in kept:
            kept[key] = self._over("inputs", product, zip(*both, strict=True))
        made = jnp.matmul(kept[key], w, precision=lax.Precision.HIGHEST)
        if stream is None:
            return made
        return made + self._over("gap", product, zip(both[0], gap, strict=True))

    def _over(self, name: str, product: Product, chunks: Iterable[Any]) -> jax.Array:
        return self._total((name, product), functools.partial(_SUMS[name], product), chunks)

    def _gap(self, stream: Ref) -> list[jax.Array]:
        """What a stream lacks in each batch: nothing where both are the same, infinite or not."""
        now, dense = (map(plain_axes, world.flows[stream]) for world in self.worlds)
        return [jnp.where(a == b, 0, a - b) for a, b in zip(dense, now, strict=True)]

    def shift(self, bias: Bias, by: jax.Array) -> None:
        """Add a vector `[outputs]` to a bias."""
        world, view = self.worlds[0], bias.view
        parts = [plain_axes(self.part(world, p)) for p in view.parts]
        old = view.read(*parts)
        new = (old.astype(jnp.float32) + by.reshape(old.shape)).astype(old.dtype)
        for p, part, each in zip(view.parts, parts, view.scatter(parts, [new]), strict=True):
            value = jnp.where(each.shown, each.values[0].astype(part.dtype), part)
            world.changed[p] = laid_as(value, self.part(world, p))
        if bias.step is not None and bias.step.outs[0] in world.fixed:
            values = [self.read(world, i, 0) for i in bias.step.ins]
            world.fixed.update(zip(bias.step.outs, bias.step.run(*values), strict=True))

    def change(self, weight: Weight, old: jax.Array, changed: Changed) -> None:
        """Put a new matrix and its mask where the weight is from; what is kept stays as it was."""
        world, (view, product) = self.worlds[0], (weight.view, weight.product)
        parts = [plain_axes(self.part(world, p)) for p in view.parts]
        form = ("change", view.moves, product)
        if form not in self.compiled:
            self.compiled[form] = jax.jit(functools.partial(_written, view, product))
        for p, (value, mask) in zip(
            view.parts, self.compiled[form](parts, old, changed), strict=True
        ):
            world.changed[p] = laid_as(value, self.part(world, p))
            world.masks[p] = mask & world.masks[p] if p in world.masks else mask


_add = jax.jit(jnp.add, donate_argnums=0)


@plain_mesh()
def _sum(a: jax.Array, b: jax.Array) -> jax.Array:
    return a + b


@plain_mesh()
def _finite(sums: Any) -> bool:
    return all(bool(jnp.isfinite(jnp.sum(x))) for x in jax.tree.leaves(sums))


def _in_order(weights: Sequence[Weight]) -> list[tuple[int, Weight, Place]]:
    each = [(place.step, weight, place) for weight in weights for place in weight.places]
    return sorted(each, key=lambda item: item[0])


def _inner(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum("...ni,...no->...io", a, b, precision=lax.Precision.HIGHEST)


def _cross(
    product: Product, x: jax.Array, theirs: jax.Array, gap: jax.Array | None, w: jax.Array
) -> jax.Array:
    """Inputs^T times what the dense model makes of its own, and a gap."""
    rows, dense = (product.rows(each).astype(jnp.float32) for each in (x, theirs))
    made = jnp.matmul(dense, w, precision=lax.Precision.HIGHEST)
    return _inner(rows, made if gap is None else made + gap.reshape(made.shape))


def _inputs(product: Product, x: jax.Array, theirs: jax.Array) -> jax.Array:
    """Inputs^T times dense inputs."""
    return _inner(*(product.rows(each).astype(jnp.float32) for each in (x, theirs)))


def _to_gap(product: Product, x: jax.Array, gap: jax.Array) -> jax.Array:
    """Inputs^T times a gap."""
    rows = product.rows(x).astype(jnp.float32)
    return _inner(rows, gap.astype(jnp.float32).reshape(rows.shape[0], -1))


_SUMS: dict[str, Callable[..., jax.Array]] = {"cross": _cross, "inputs": _inputs, "gap": _to_gap}


def _written(
    view: View, product: Product, parts: Sequence[jax.Array], old: jax.Array, changed: Changed
) -> list[Changed]:
    """For each part its new value, and its mask."""
    new, mask = changed
    mask = jnp.broadcast_to(mask, new.shape)
    values = [product.weight(x) for x in (new, new != old, mask)]
    found = []
    for part, (shown, (value, moved, stays)) in zip(
        parts, view.scatter(parts, values), strict=True
    ):
        kept = (stays > 0.5) | ~shown
        now = jnp.where(moved > 0.5, value.astype(part.dtype), part)
        found.append((jnp.where(kept, now, jnp.zeros((), part.dtype)), kept))
    return found


def _outputs(product: Product) -> int:
    return math.prod(product.shape[i] for i in product.outputs)


def walk_of(
    line: Line,
    leaves: Sequence[jax.Array],
    batches: Sequence[Sequence[Value]],
    *,
    measure: Measure = Product.gram,
    dense: Sequence[jax.Array] | None = None,
    outputs: bool = False,
) -> Walk:
    """Start a walk.

    Args:
      line: the program; its inputs are the leaves, and then those of a batch.
      leaves: the parameters.
      batches: arrays of each of them.
      measure: what is summed where weights meet data.
      dense: parameters of a world that goes along, in which nothing is changed.
      outputs: whether results are wanted in the end.
    """
    last: dict[Ref, int] = {}
    for number, step in enumerate(line.steps):
        last.update(dict.fromkeys(step.ins, number))
    if outputs:
        last.update(dict.fromkeys(line.outs, len(line.steps)))
    refs = line.ins[len(leaves) :]
    flows = lambda: {r: [b[i] for b in batches] for i, r in enumerate(refs)}  # noqa: E731
    worlds = [World(each, flows()) for each in (leaves, dense) if each is not None]
    return Walk(line, worlds, measure, last, len(batches))


def calibrate(
    walk: Walk,
    stops: Sequence[Stop],
    visit: Callable[[Visit], Changed | None],
    *,
    name: Callable[[Weight], str] = str,
    progress: Callable[[Sequence[Stop]], Iterator[Stop]] = iter,
) -> None:
    """Walk from stop to stop, and let ``visit`` change the weights there.

    Raises:
      ValueError: data that a weight meets, or what the dense network makes of it, is not finite;
        ``name`` says what the weight is called.
    """
    start = 0
    for stop in progress(stops):
        for world in walk.worlds:
            walk.run(start, stop.step, world)
        start = stop.step
        sums = walk.gather(stop, name)
        kept: dict[Hashable, Any] = {}
        outputs = sum(_outputs(weight.product) for weight in stop.weights)
        with plain_mesh():
            for weight in stop.weights:
                alone = len(weight.places) == 1 and stop.end == stop.step
                matrix = walk.matrix(walk.worlds[0], weight.view, weight.product)
                cross = walk.cross(weight.places[0], outputs, kept) if alone else None
                if not _finite(cross):
                    raise ValueError(
                        f"What the dense network makes at {name(weight)!r} is not finite. Does it "
                        "overflow in its dtype? Without targets='dense' nothing asks for it."
                    )
                changed = visit(Visit(weight, matrix, sums[weight], cross))
                if changed is not None:
                    walk.change(weight, matrix, changed)
    walk.start = start
