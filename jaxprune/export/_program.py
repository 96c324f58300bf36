"""A function with its parameters inside, the shapes of its inputs, and values to try it on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._tree import is_array, join_static, leaves_with_path, list_paths, split_static
from jaxprune.export._bake import bake
from jaxprune.export._door import check_call, explain
from jaxprune.export._sizes import (
    first_sizes,
    named_specs,
    other_sizes,
    sized,
    solve,
    symbols,
)
from jaxprune.typing import Masks, Params


class Program(NamedTuple):
    """A function that is ready to leave.

    Attributes:
      reference: the function, compiled, from the input arrays to the list of results.
      closed: its jaxpr at the specs, parameters inside.
      specs: shapes and types of the input arrays, some axes of any size.
      given: the input arrays as they were given.
      spec_tree: the specs nested as the inputs are, without inputs that hold no array.
      outputs: shapes and types of the results.
      sizes: how large the axes of any size are in the examples, by their names.
      batch: name of the first axis of the first input; None where its size is fixed.
    """

    reference: Callable[..., list[Any]]
    closed: Any
    specs: list[jax.ShapeDtypeStruct]
    given: list[Any]
    spec_tree: tuple[Any, ...]
    outputs: Any
    sizes: dict[str, int]
    batch: str | None


def make_program(
    user: str,
    fn: Callable[..., Any],
    params: Params,
    inputs: Sequence[Any],
    *,
    masks: Masks | None,
    batch: str | None,
    shapes: Any,
) -> Program:
    """Take the parameters in and find out that the function can be traced at these shapes."""
    check_call(user, fn, params, inputs)
    arrays, static = split_static(inputs)
    _check_arrays(user, params, arrays)
    if masks is not None:
        params = bake(params, masks)
    weights, others = split_static(params)
    weights = jax.device_put(weights, cpu())

    @jax.jit  # the weights as an argument: constants would be folded at every compilation
    def run(weights: Any, arrays: Any) -> Any:
        return fn(join_static(weights, others), *join_static(arrays, static))

    fixed = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    specs = _specs(user, fixed, _nest(fixed, inputs), batch, shapes)
    sizes = solve(user, specs, fixed) if _is_fixed(fixed) else first_sizes(user, specs)
    flat = lambda *arrays: run(weights, arrays)  # noqa: E731
    try:
        closed, outputs = _trace(user, flat, specs, fixed)
    except Exception as error:
        explain(user, fn, params, inputs, error)
        raise
    if not jax.tree.leaves(outputs):
        raise ValueError(f"`export.{user}` got a function that returns no array. Return one.")
    trees = tuple(tree for tree in _nest(specs, inputs) if jax.tree.leaves(tree))
    reference = lambda *arrays: jax.tree.leaves(run(weights, arrays))  # noqa: E731
    first = next((str(x.shape[0]) for x in specs if x.shape), None)
    named = first if first in sizes else None
    return Program(reference, closed, specs, arrays, trees, outputs, sizes, named)


def _nest(specs: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Put specs in the places of the arrays; None for what is no array."""
    left = iter(specs)
    return tuple(jax.tree.map(lambda x: next(left) if is_array(x) else None, x) for x in inputs)


def _is_fixed(specs: Sequence[Any]) -> bool:
    return all(isinstance(n, int) for x in specs for n in x.shape)


def _specs(
    user: str, fixed: Sequence[Any], trees: Any, batch: str | None, shapes: Any
) -> list[jax.ShapeDtypeStruct]:
    """Shapes with names for the axes of any size."""
    if shapes is not None:
        return named_specs(user, fixed, trees, shapes)
    size = next((x.shape[0] for x in fixed if x.shape), None) if batch else None
    if batch is None or size is None or not _is_fixed(fixed):
        return list(fixed)
    return _symbolic(fixed, size, batch)


def cpu() -> jax.Device:
    """Where files are compared with JAX: elsewhere a float32 product may be less than that."""
    return jax.devices("cpu")[0]


def _check_arrays(user: str, params: Params, arrays: Sequence[Any]) -> None:
    abstract = [p for p, x in leaves_with_path(params) if isinstance(x, jax.ShapeDtypeStruct)]
    if abstract:
        raise TypeError(
            f"`export.{user}` got params without values at {list_paths(abstract)}. Pass arrays."
        )
    if not arrays:
        raise ValueError(
            f"`export.{user}` got no input array, so that nobody knows what `fn` takes. Pass "
            "examples after the params, arrays or jax.ShapeDtypeStruct."
        )
    kinds = [f"{x.dtype}" for x in arrays if jnp.issubdtype(x.dtype, jax.dtypes.extended)]
    if kinds:
        raise TypeError(
            f"`export.{user}` got an input of type {kinds[0]}, which exists in JAX only. Close "
            "over keys, or export the function without randomness."
        )


def _symbolic(fixed: Sequence[Any], size: int, name: str) -> list[jax.ShapeDtypeStruct]:
    """Give a name to the first axis of all inputs that have the size of the first one's."""
    batch = jax.export.symbolic_shape(name)[0]
    return [
        jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) if x.shape[:1] == (size,) else x
        for x in fixed
    ]


def _trace(user: str, flat: Any, specs: Sequence[Any], fixed: Sequence[Any]) -> tuple[Any, Any]:
    """Trace, and tell a function that fails from one that needs to know its batch."""
    try:
        return jax.make_jaxpr(flat, return_shape=True)(*specs)
    except Exception as error:
        if not _is_fixed(specs):
            if _is_fixed(fixed):
                jax.eval_shape(flat, *fixed)  # what fails here too is the function's own error
            raise ValueError(
                f"`export.{user}` cannot trace `fn` for {_any_size(specs)}: "
                f"{type(error).__name__}: {str(error).splitlines()[0]} {_hint(specs)}"
            ) from error
        raise


def _any_size(specs: Sequence[Any]) -> str:
    named = list(symbols(specs))
    return "a batch of any size" if len(named) == 1 else f"{', '.join(named)} of any size"


def _hint(specs: Sequence[Any]) -> str:
    if len(symbols(specs)) == 1:
        return (
            "Write shapes as `x.shape[0]` instead of `len(x)` or a number, or pass `batch=None` "
            "for the shapes as given."
        )
    return (
        "Write shapes as `x.shape[1]` instead of a number, say what the sizes obey with "
        "`shapes=jax.export.symbolic_args_specs(inputs, words, constraints=('time <= 512',))`, or "
        "leave an axis as it is with `_` for its name."
    )


def names(tree: Any, prefix: str) -> list[str]:
    """Name the leaves of a tree by their paths: ``output``, ``input_0``, ``output_logits``."""
    paths = [path for path, _ in leaves_with_path(tree)]
    found = ["_".join([prefix, *path.split("/")]) if path else prefix for path in paths]
    twice = len(set(found)) < len(found)  # such as `a_b` beside `a/b`
    return [f"{prefix}_{i}" for i in range(len(found))] if twice else found


def trials(program: Program, seed: int) -> Iterator[list[np.ndarray]]:
    """Inputs to compare on: those given, random ones, and random ones of other sizes."""
    rng = np.random.default_rng(seed)
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in program.given):
        yield [np.asarray(x) for x in program.given]
    yield draw(program, rng, program.sizes)
    if program.sizes:
        yield draw(program, rng, other_sizes(program.specs, program.sizes, program.batch))


def draw(program: Program, rng: np.random.Generator, sizes: Mapping[str, int]) -> list[np.ndarray]:
    """Random inputs: normal floats, integers between the smallest and the largest given."""
    drawn = []
    shapes = sized(program.specs, sizes)
    for given, spec, shape in zip(program.given, program.specs, shapes, strict=True):
        if jnp.issubdtype(spec.dtype, jnp.inexact):
            values: Any = rng.standard_normal(shape)
        else:
            known = np.zeros(1) if isinstance(given, jax.ShapeDtypeStruct) else np.asarray(given)
            low, high = (int(known.min()), int(known.max())) if known.size else (0, 0)
            values = rng.integers(low, high, shape, endpoint=True)
        drawn.append(np.asarray(values).astype(spec.dtype))
    return drawn
