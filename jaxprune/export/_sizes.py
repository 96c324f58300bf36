"""Axes of any size: their names, and the sizes to try a program at."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Specs = Sequence[jax.ShapeDtypeStruct]
FUNCTIONS = {"mod", "floordiv", "max", "min"}  # in the words for a size that depends on others
FIRST = (4, 8, 16, 2, 3, 1, 32, 64, 128, 224, 256, 512)  # where examples have shapes alone


def named_specs(user: str, fixed: Specs, trees: Any, shapes: Any) -> list[jax.ShapeDtypeStruct]:
    """Give names to axes, by words as ``jax.export.symbolic_args_specs`` takes them."""
    if any(not isinstance(leaf, str) for leaf in jax.tree.leaves(shapes)):
        specs = jax.tree.leaves(shapes)
    else:
        try:
            specs = jax.tree.leaves(jax.export.symbolic_args_specs(trees, shapes))
        except Exception as error:
            raise ValueError(
                f"`export.{user}` got shapes={shapes!r} for inputs of shapes "
                f"{[list(x.shape) for x in fixed]}: {error} Pass one string for all inputs, such "
                "as 'batch, time, ...', or a tuple with one for each."
            ) from error
    if [len(getattr(x, "shape", ())) for x in specs] != [len(x.shape) for x in fixed]:
        raise ValueError(
            f"`export.{user}` got shapes={shapes!r}, which do not fit inputs of shapes "
            f"{[list(x.shape) for x in fixed]}. Pass a shape for each input array."
        )
    return [jax.ShapeDtypeStruct(s.shape, x.dtype) for s, x in zip(specs, fixed, strict=True)]


def symbols(specs: Specs) -> dict[str, Any]:
    """The names among the sizes, each as a size."""
    sizes = [n for x in specs for n in x.shape if not isinstance(n, int)]
    names = sorted({name for n in sizes for name in re.findall(r"[A-Za-z_]\w*", str(n))})
    names = [name for name in names if name not in FUNCTIONS]
    return {name: jax.export.symbolic_shape(name, scope=sizes[0].scope)[0] for name in names}


def solve(specs: Specs, shapes: Sequence[Any]) -> dict[str, int]:
    """Read from actual shapes how large each name is."""
    known = symbols(specs)
    return dict(zip(known, (s[0] for s in _shapes(specs, [(n,) for n in known.values()], shapes)),
                    strict=True)) if known else {}  # fmt: skip


def sized(specs: Specs, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
    """Shapes where each name has a size; an error where that breaks a constraint."""
    known = symbols(specs)
    if not known:
        return [x.shape for x in specs]
    single = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in known.values()]
    return _shapes(single, [x.shape for x in specs], [(sizes[name],) for name in known])


def _shapes(given: Specs, wanted: Sequence[Any], actual: Sequence[Any]) -> list[tuple[int, ...]]:
    """Let JAX work out shapes from actual ones, as it does when it calls what was exported."""
    make = jax.jit(lambda *_: [jnp.zeros(shape) for shape in wanted])
    exported = jax.export.export(make)(*given)
    specs = [jax.ShapeDtypeStruct(s, x.dtype) for s, x in zip(actual, given, strict=True)]
    return [x.shape for x in jax.eval_shape(exported.call, *specs)]


def first_sizes(user: str, specs: Specs) -> dict[str, int]:
    """Sizes to begin with where examples have no values: different ones, if they may differ."""
    names = list(symbols(specs))
    tries = [{name: n + i for i, name in enumerate(names)} for n in FIRST]
    tries += [dict.fromkeys(names, n) for n in FIRST]
    found = _allowed(specs, iter(tries))
    if found is None:
        raise ValueError(
            f"`export.{user}` finds no sizes to try {', '.join(names)} at. Pass arrays as "
            "examples, and these names in `shapes`."
        )
    return found


def other_sizes(specs: Specs, sizes: Mapping[str, int], batch: str | None) -> dict[str, int]:
    """Sizes that differ from those of the examples, as far as they may."""
    rest = [lambda n: 2 * n, lambda n: n + 1, lambda n: n - 1, lambda n: n // 2, lambda n: n]
    one = 3 if batch is not None and sizes[batch] == 1 else 1
    tries = (
        {name: one if name == batch else max(change(n), 1) for name, n in sizes.items()}
        for change in rest
    )
    return _allowed(specs, tries) or dict(sizes)


def _allowed(specs: Specs, tries: Iterator[dict[str, int]]) -> dict[str, int] | None:
    for sizes in tries:
        try:
            sized(specs, sizes)
        except ValueError:  # a constraint
            continue
        return sizes
    return None
