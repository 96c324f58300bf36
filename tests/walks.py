"""A function walked through on its inputs, with whatever is to be known of the walk afterwards."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune._calibrate import Walk, calibrate, walk_of
from jaxprune._tree import split_static
from jaxprune.graph._line import line_of
from jaxprune.graph._linear import Part, View
from jaxprune.graph._network import network
from jaxprune.graph._products import Found, find_products, stops_of


class Walked(NamedTuple):
    """Everything about one walk.

    Attributes:
      found: the weights, and why other leaves are none.
      paths: of all leaves.
      visits: what was known at each weight, in order.
      made: of each visit the sum of squares of the product's results; None inside of loops.
      outputs: of each batch, as arrays.
      walk: the walk itself.
    """

    found: Found
    paths: list[str]
    visits: list[Any]
    made: list[float | None]
    outputs: list[list[Any]]
    walk: Walk

    def reason(self, path):
        """Why a leaf is left alone; nothing if it is not."""
        return self.found.reasons.get(self.paths.index(path), "")

    def seen(self):
        """The paths of the leaves that were visited, with how often."""
        names = [self.paths[p.leaf] for v in self.visits for p in v.weight.view.parts]
        return {name: names.count(name) for name in names}


def planned(fn, params, *inputs):
    """The line of a function, what it does with its weights, and what they are called."""
    net = network(fn, params, inputs, {}, exact=False, complain=False, solved=False)
    n = len(net.paths)
    views = [View((Part(i),)) if i < n else None for i in range(len(net.frame.inputs))]
    line = line_of(net.analysis, net.frame, views)
    return line, find_products(line, net.shapes), net.paths


def walked(fn, params, *batches, visit=None):
    """Walk through a function on batches (tuples of inputs), and see what it gives.

    ``visit`` changes weights; without one each is put back as it is, through all that writes.
    """
    line, found, paths = planned(fn, params, *batches[0])
    split = [split_static(((params, *b), {}))[0] for b in batches]
    n, visits, made = len(paths), [], []
    walk = walk_of(line, split[0][:n], [arrays[n:] for arrays in split], outputs=True)

    def see(at):
        visits.append(at)
        made.append(_made(walk, at.weight))
        same = at.matrix, jnp.ones(at.matrix.shape, bool)
        return same if visit is None else visit(at)

    calibrate(walk, stops_of(found.weights), see)
    return Walked(found, paths, visits, made, walk.outputs(), walk)


def _made(walk, weight):
    """The sum of squares of what a weight makes of its inputs, by the operation itself."""
    place = weight.places[0]
    if place.order is not None or len(weight.places) > 1:
        return None
    step, world, total = walk.line.steps[place.step], walk.worlds[0], 0.0
    data = walk.line.data.intersection(step.ins)
    if not data <= world.flows.keys():  # a stretch that is seen whole has not been run yet
        return None
    for chunk in range(walk.batches):
        (out,) = step.run(*(walk.read(world, i, chunk) for i in step.ins))
        total += float((np.asarray(out, np.float64) ** 2).sum())
    return total


def assert_walks_exactly(fn, params, *inputs, tolerance=2e-5):
    """Assert that a walk that changes nothing gives what ``fn`` gives, and sees what it sees.

    The sum of squares of a product is ``trace(w.T @ gram @ w)``, whatever its spelling.
    """
    got = walked(fn, params, inputs, inputs)
    want = [np.asarray(x) for x in jax.tree.leaves(fn(params, *inputs)) if is_number(x)]
    have = [np.asarray(x) for x in got.outputs[1] if is_number(x)]
    for a, b in zip(have, want, strict=True):
        scale = max(float(np.abs(b).max(initial=0)), 1e-6)
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)
    for visit, total in zip(got.visits, got.made, strict=True):
        assert visit.sums.dtype == jnp.float32
        if total is not None:
            np.testing.assert_allclose(energy(visit), total, rtol=max(10 * tolerance, 1e-4))
    walk = got.walk
    for part, value in walk.worlds[0].changed.items():
        np.testing.assert_array_equal(value, walk.worlds[0].leaves[part.leaf][part.layer])
    return got


def is_number(x):
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, np.number)


def energy(visit):
    """The sum of squares of what a weight makes of its inputs, from the Gram matrix."""
    w = np.asarray(visit.matrix, np.float64)
    return float((w * (np.asarray(visit.sums, np.float64) @ w)).sum())


def wanda_by_numpy(x, w, sparsity):
    """Mask of one weight `[inputs, outputs]` on its inputs `[rows, inputs]`, one by one."""
    scores = np.abs(w) * np.sqrt((np.asarray(x, np.float64) ** 2).sum(0))[:, None]
    return jp.find_masks(
        {"w": jnp.asarray(scores, jnp.float32)},
        sparsity,
        criterion=lambda p, **_: p,
        scope=jp.scopes.per_output,
    )["w"]
