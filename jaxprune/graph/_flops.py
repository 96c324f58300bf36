"""Multiplications and additions of a function, counted from its jaxpr."""

import math
from typing import Any

import jax
from jax.extend import core

from jaxprune._tree import join_static, split_static
from jaxprune.graph._lean import lean
from jaxprune.graph._network import check_call, spec_of


def count_flops(fn: Any, params: Any, *inputs: Any, **keywords: Any) -> int:
    """Count the floating-point operations of matrix products and convolutions.

    Two for each multiply-add. Whatever else a network does (activations, norms, softmax) is left
    out, as papers do. The body of a scan counts once for every step, that of a branch as its most
    expensive case, that of a while loop once, since nobody knows how often it runs. What no
    result depends on does not count. Nothing is computed.

    Args:
      fn: function of params and inputs; the ``small_fn`` of ``shrink`` is one.
      params: its parameters, arrays or ``jax.ShapeDtypeStruct``.
      *inputs: its inputs, likewise.
      **keywords: its keyword arguments.

    Returns:
      The number of operations for these inputs, the whole batch.

    Example:
      >>> import jax.numpy as jnp
      >>> count_flops(lambda w, x: x @ w, jnp.ones((3, 5)), jnp.ones((2, 3)))
      60
    """
    check_call(fn, keywords, count_flops)
    arrays, static = split_static(((params, *inputs), keywords))

    def flat(*arrays: Any) -> Any:
        positional, named = join_static(arrays, static)
        return fn(*positional, **named)

    specs = [spec_of(x) for x in arrays]
    return _count(lean(jax.make_jaxpr(flat)(*specs)).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_of(eqn) for eqn in jaxpr.eqns)


def _of(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    out = [v.aval for v in eqn.outvars]
    if name == "dot_general":
        (left, _), _ = params["dimension_numbers"]
        return 2 * out[0].size * math.prod(eqn.invars[0].aval.shape[i] for i in left)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        return (
            2 * out[0].size * kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        )
    inner = [_count(jaxpr) for jaxpr in _inside(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "shard_map":  # on every device
        mesh = dict(params["mesh"].shape)
        return math.prod(mesh[axis] for axis in params["newly_manual_axes"]) * sum(inner)
    return max(inner, default=0) if name == "cond" else sum(inner)


def _inside(params: dict[str, Any]) -> list[core.Jaxpr]:
    """Jaxprs among the parameters of an equation, or in a tuple there."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
