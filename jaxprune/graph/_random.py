"""Rules for random keys and for the numbers drawn by them."""

# The small network draws what the large one drew, so that dropout and noise are the same for what
# is left: numbers are drawn whole and cut then. Keys may be split into one for each layer of a
# scan, so that axes of an array of keys pass; what is inside of a key stays whole.
#
#     k: key<fry>[4] = random_split[shape=(4,)] key     a layer of a scan each
#     b: u32[3,8] = random_bits[shape=(3, 8)] k0        fresh ids: any channel can be left out

from collections.abc import Sequence

import jax

from jaxprune.graph._axes import Axes, Axis
from jaxprune.graph._elementwise import same
from jaxprune.graph._shapes import cut_made, make, opaque
from jaxprune.graph._site import Rule, Site
from jaxprune.graph._take import take

_THREEFRY = ("threefry2x32", "threefry4x32")  # the cipher that keys are made by


def keys(at: Site) -> list[Axes]:
    """Keys made from keys: those that are there pass, the new ones can be left out again."""
    (axes,) = at.ins
    return [(*axes, *at.fresh(at.out_shape()[len(axes) :]))]


def cut_split(at: Site, keys: jax.Array) -> list[jax.Array]:
    """Split into as many as ever and drop those of layers that are gone."""
    (drawn,) = at.bind(keys)
    rank = len(at.shape())
    return [take(drawn, [*[None] * rank, *at.kept_outs()[0][rank:]])]


def wrap(at: Site) -> list[Axes]:
    """Numbers of a key lie along the last axis, which stays whole."""
    (axes,) = at.ins
    for axis in axes[len(at.out_shape()) :]:
        at.freeze(axis)
    return [axes[: len(at.out_shape())]]


def unwrap(at: Site) -> list[Axes]:
    (axes,) = at.ins
    return [(*axes, *[None] * (len(at.out_shape()) - len(axes)))]


def fold(at: Site) -> list[Axes]:
    """Fold numbers into keys, one by one."""
    out: Sequence[Axis | None] = [
        None if ids is None else Axis(ids, False)
        for ids in (at.join(*axes) for axes in zip(*at.ins, strict=True))
    ]
    return [tuple(out)]


RULES = {
    **{name: Rule(make, cut_made) for name in ("random_bits", "rng_uniform")},
    **{
        name: Rule(opaque)
        for name in ("random_seed", "random_gamma", "rng_bit_generator", *_THREEFRY)
    },
    "random_split": Rule(keys, cut_split),
    "random_wrap": Rule(wrap),
    "random_unwrap": Rule(unwrap),
    "random_fold_in": Rule(fold),
    "random_clone": Rule(same),
}
