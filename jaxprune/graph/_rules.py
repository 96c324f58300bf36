"""The rules of all primitives, by name."""

from jaxprune.graph import (
    _calls,
    _collectives,
    _contractions,
    _derivatives,
    _effects,
    _elementwise,
    _indexing,
    _linalg,
    _loops,
    _random,
    _reshape,
    _shapes,
)

RULES = {
    **_elementwise.RULES,  # add, mul, exp, select_n, ...: axes at the same place are joined
    **_contractions.RULES,  # dots, convolutions, reductions, sorts: axes are summed or run along
    **_reshape.RULES,  # reshape: products of ids, for heads and groups of channels
    **_shapes.RULES,  # transpose, broadcast, concatenate, slice, ...: ids move with the values
    **_indexing.RULES,  # gather, scatter, dynamic slices: whole axes pass, indexed ones stay
    **_linalg.RULES,  # decompositions, solvers, Fourier transforms: batches of matrices pass
    **_random.RULES,  # keys, and numbers drawn by them: drawn whole, then cut
    **_effects.RULES,  # references, callbacks
    **_calls.RULES,  # jit, remat, cond: a frame for each call
    **_loops.RULES,  # scan, while: a frame for all steps, what is carried is joined
    **_derivatives.RULES,  # custom_jvp, custom_vjp: a frame for the derivative, too
    **_collectives.RULES,  # shard_map, psum, all_gather, reshard: of shards all lose the same
}
