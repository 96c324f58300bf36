"""Multiplications and additions of a function, counted from its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from jaxprune._tree import join_static, split_static
from jaxprune.graph._frames import shape_of
from jaxprune.graph._lean import lean
from jaxprune.graph._network import check_call, spec_of
from jaxprune.typing import Params


def count_flops(fn: Callable[..., Any], params: Params, *inputs: Any, **keywords: Any) -> int:
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


def _of(eqn: core.JaxprEqn) -> int:
    """Operations of one equation, those inside of it included."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":  # each entry of the result sums over the contracted axes
        (left, _), _ = params["dimension_numbers"]
        lhs = shape_of(eqn.invars[0])
        return 2 * math.prod(shape_of(eqn.outvars[0])) * math.prod(lhs[i] for i in left)
    if name == "conv_general_dilated":  # and here over the kernel of its channel
        kernel = shape_of(eqn.invars[1])
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(shape_of(eqn.outvars[0])) * math.prod(kernel) // outputs
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
