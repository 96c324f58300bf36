"""The rules of all primitives, by name."""

from jaxprune.graph import (
    _calls,
    _collectives,
    _contractions,
    _effects,
    _elementwise,
    _indexing,
    _linalg,
    _shapes,
)

RULES = {
    **_elementwise.RULES,  # add, mul, exp, select_n, ...: axes at the same place are joined
    **_contractions.RULES,  # dots, convolutions, reductions, sorts: axes are summed or run along
    **_shapes.RULES,  # reshape, broadcast, concatenate, slice, ...: ids move with the values
    **_indexing.RULES,  # gather, scatter, dynamic slices: whole axes pass, indexed ones stay
    **_linalg.RULES,  # decompositions, solvers, Fourier transforms: batches of matrices pass
    **_effects.RULES,  # references, callbacks
    **_calls.RULES,  # jit, remat, scan, while, cond, custom derivatives: a frame for each call
    **_collectives.RULES,  # shard_map, psum, all_gather, reshard; keys of layers and devices
}
