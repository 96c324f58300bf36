"""A network on somebody else's numbers: its jaxpr, evaluated by NumPy's protocols."""

import functools
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxprune._tree import join_static, leaves_with_path, list_paths, split_static
from jaxprune.export._door import check_call, explain
from jaxprune.export._fold import CALLS
from jaxprune.export._products import aval_of, bind
from jaxprune.export._replay_rules import MOVES, RULES, move
from jaxprune.graph._loops import scan_sizes
from jaxprune.graph._source import source_line
from jaxprune.typing import Params

Value = Any  # an array that no input went into, or a `Foreign`


class Foreign(NamedTuple):
    """What depends on an input; without a value while rules are looked for.

    Attributes:
      value: an array of somebody's numbers.
      plain: whether it is an array of NumPy, whose integers and bools are those of JAX.
    """

    value: Any
    plain: bool


class Walk(NamedTuple):
    """What a walk over equations knows.

    Attributes:
      rules: those of the user, by primitive or name of a jitted function.
      number: makes a number of the user's kind of one of ours; None leaves it a float.
      missing: where there is a list, equations without a rule are put there, nothing is computed.
      met: names of what inputs went into, primitives and functions, are put there.
    """

    rules: Mapping[str, Callable[..., Any]]
    number: Callable[[float], Any] | None
    missing: list[str] | None
    met: set[str]


def replay(
    fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    rules: Mapping[str, Callable[..., Any]] | None = None,
    number: Callable[[float], Any] | None = None,
) -> Any:
    """Evaluate a network on numbers that JAX does not know.

    Whatever follows NumPy's protocols may go in: variables of a hardware compiler (da4ml prices a
    network in adders so), object arrays of fractions or intervals. ``fn`` is traced once, and its
    equations are computed on those numbers by ``np.matmul``, ``np.add`` and the like, without
    JAX. What depends on params alone, such as their quantization, is computed by JAX
    as ever, so that the weights are those of the float32 program; nothing after that is rounded,
    unless by the numbers themselves.

    NumPy's own floats are computed in float64, its integers in the dtype that JAX has, so that they
    wrap as there. Integers of others do not wrap: 200 + 100 is 300, uint8 or not, and casts that
    may change one (fewer bits, or another sign) have no rule.

    There are rules for arithmetic with constants and among inputs, comparisons, ``where``, sums
    and maxima, matrix products, convolutions, pooling, all that only moves numbers, and calls and
    scans of those.

    Args:
      fn: function of params and inputs.
      params: its parameters, ordinary arrays; apply masks first.
      *inputs: trees of array-likes with a ``shape``. They are traced as float32, or as the
        integers or bools that their ``dtype`` says. What has no shape, such as flags, is held
        fixed.
      rules: functions for primitives that have no rule, or in place of one that has: from the
        operands, and the params of the primitive as keywords, to the result, or a list of several.
        The name of a jitted function stands for all of it: ``{"quantize": lambda x, **_:
        x.quantize(1, 0, 7)}``.
      number: makes a number of that kind of a float, for the constants that meet one, as
        ``fractions.Fraction`` does; None leaves them float64 arrays.

    Returns:
      What ``fn`` returns, of the kind of the inputs; NumPy arrays where no input went in.

    Raises:
      NotImplementedError: primitives without a rule meet an input; they are named with their
        lines, the first twelve, before anything is computed.
      TypeError: arguments in the wrong places, numbers without a shape, traced params.
      ValueError: a rule gave another shape than JAX has, or nothing has its name; a constant is
        infinite, as those that mask are, and the numbers that it meets cannot be.

    Example:
      >>> from fractions import Fraction
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> x = np.array([[Fraction(1, 3), Fraction(1, 7)]])
      >>> replay(lambda w, x: jnp.maximum(x @ w, 0), jnp.array([[1.0], [0.5]]), x, number=Fraction)
      array([[Fraction(17, 42)]], dtype=object)
    """
    _check(fn, params, inputs, rules or {})
    arrays, static = split_static(params)
    leaves, structure = jax.tree.flatten(inputs)
    given = [x for x in leaves if hasattr(x, "shape")]
    specs = [jax.ShapeDtypeStruct(tuple(x.shape), _dtype(x)) for x in given]
    numbers = [_ours(x, spec) for x, spec in zip(given, specs, strict=True)]

    def with_fixed(given: Sequence[Any]) -> Any:
        left = iter(given)
        filled = [next(left) if hasattr(x, "shape") else x for x in leaves]
        return jax.tree.unflatten(structure, filled)

    def call(arrays: Any, given: Any) -> Any:
        return fn(join_static(arrays, static), *with_fixed(given))

    try:
        closed, out = jax.make_jaxpr(call, return_shape=True)(arrays, specs)
    except Exception as error:
        explain("replay", fn, params, with_fixed(specs), error)
        raise
    walk = Walk(rules or {}, number, missing=[], met=set())
    unknown = [Foreign(None, type(x) is np.ndarray) for x in numbers]
    _run(closed.jaxpr, closed.consts, [*arrays, *unknown], walk, None)
    _refuse(walk)
    walk = walk._replace(missing=None)
    outs = _run(closed.jaxpr, closed.consts, [*arrays, *map(_foreign, numbers)], walk, None)
    values = [x.value if isinstance(x, Foreign) else np.asarray(x) for x in outs]
    return jax.tree.unflatten(jax.tree.structure(out), values)


def _check(
    fn: Callable[..., Any], params: Params, inputs: Sequence[Any], rules: Mapping[str, Any]
) -> None:
    check_call("replay", fn, params, inputs)
    found = [(i, *each) for i, given in enumerate(inputs) for each in leaves_with_path(given)]
    flags = not found or any(hasattr(leaf, "shape") for *_, leaf in found)
    for i, path, leaf in found:
        if hasattr(leaf, "shape") or (flags and not _is_number(leaf)):
            continue
        where = f"input {i}" + (f" at {path!r}" if path else "")
        raise TypeError(
            f"`export.replay` got an object of type `{type(leaf).__name__}` as {where}, "
            "which has no shape. Pass array-likes, as `np.asarray(values, dtype=object)`."
        )
    traced = [path for path, x in leaves_with_path(params) if isinstance(x, jax.core.Tracer)]
    if traced:
        raise TypeError(
            f"`export.replay` got params without values ({traced[0]!r} is traced). Call it outside "
            "of `jit` and `grad`."
        )
    wrong = [name for name, rule in rules.items() if not callable(rule)]
    if wrong:
        raise TypeError(
            f"`export.replay(rules=)` has no function for {wrong[0]!r}. Pass one of the operands "
            f"and keywords: `{{{wrong[0]!r}: lambda x, **params: ...}}`."
        )


def _is_number(x: Any) -> bool:
    """True for a number that no trace can hold fixed, since JAX does not know it."""
    return isinstance(x, Number) and not isinstance(x, bool | int | float | complex)


def _dtype(x: Any) -> Any:
    """The dtype that an input is traced with."""
    dtype = getattr(x, "dtype", None)
    kind = getattr(dtype, "kind", "O")
    return jax.dtypes.canonicalize_dtype(dtype) if kind in "iub" else jnp.float32


def _ours(x: Any, spec: jax.ShapeDtypeStruct) -> Any:
    """An array of NumPy or JAX with integers and bools as traced, and floats of 64 bits."""
    if not isinstance(x, np.ndarray | np.generic | jax.Array):
        return x
    known = np.asarray(x)
    if known.dtype == object:
        return known
    return known.astype(spec.dtype if known.dtype.kind in "iub" else np.float64)


def _foreign(x: Any) -> Foreign:
    """Take a result in; a number alone becomes an array without axes."""
    array = x if hasattr(x, "shape") and not isinstance(x, np.generic) else np.asarray(x)
    return Foreign(array, type(array) is np.ndarray)


def _refuse(walk: Walk) -> None:
    """Refuse equations without a rule, and rules that nothing asked for: typing errors."""
    unused = [name for name in walk.rules if name not in walk.met]
    if unused:
        raise ValueError(
            f"`export.replay(rules=)` has one for {unused[0]!r}, but inputs go into nothing of "
            f"that name, only into {list_paths(sorted(walk.met))}. Rules are for primitives and "
            "for functions under `jax.jit`."
        )
    if walk.missing:
        found = list(dict.fromkeys(walk.missing))
        name = found[0].split("`")[1]
        more = f" and {len(found) - 12} more" if len(found) > 12 else ""
        raise NotImplementedError(
            f"`export.replay` has no rule for {', '.join(found[:12])}{more}. Pass one: "
            f"`rules={{{name!r}: lambda *operands, **params: ...}}`, or keep that part out of `fn`."
        )


def _run(
    jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Value], walk: Walk, line: str | None
) -> list[Value]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def value(atom: Any) -> Value:
        return env[atom] if isinstance(atom, core.Var) else atom.val

    for eqn in jaxpr.eqns:
        with eqn.ctx.manager:
            values = [value(v) for v in eqn.invars]
            outs = _evaluate(eqn, values, walk, source_line(eqn) or line)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [value(v) for v in jaxpr.outvars]


def _evaluate(
    eqn: core.JaxprEqn, values: Sequence[Value], walk: Walk, line: str | None
) -> list[Value]:
    name, foreign = eqn.primitive.name, [isinstance(x, Foreign) for x in values]
    called = str(eqn.params.get("name", name))
    if any(foreign):
        walk.met.update((name, called))
        own = walk.rules.get(called, walk.rules.get(name))
        if own is not None:
            return _by_own(eqn, values, walk, line, own)
    if name in CALLS:
        inner = eqn.params[CALLS[name]]
        jaxpr, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
        return _run(jaxpr, consts, values, walk, line)
    if not any(foreign):
        with jax.ensure_compile_time_eval():
            return list(bind(eqn, values))
    if name == "scan":
        return _scan(eqn.params, values, walk, line)
    return _by_rule(eqn, values, walk, line)


def _by_own(
    eqn: core.JaxprEqn,
    values: Sequence[Value],
    walk: Walk,
    line: str | None,
    own: Callable[..., Any],
) -> list[Value]:
    """Compute an equation by a rule of the user, who may give arrays of any kind."""
    if walk.missing is not None:
        return [Foreign(None, plain=False) for _ in eqn.outvars]
    return _apply(eqn, values, walk, line, lambda *xs: own(*xs, **eqn.params))


def _by_rule(
    eqn: core.JaxprEqn, values: Sequence[Value], walk: Walk, line: str | None
) -> list[Value]:
    name, foreign = eqn.primitive.name, [isinstance(x, Foreign) for x in values]
    which, rule = MOVES.get(name), RULES.get(name)
    if all(0 in aval_of(v).shape for v in eqn.outvars):  # without entries: nothing went in
        return [np.zeros(aval_of(v).shape, aval_of(v).dtype) for v in eqn.outvars]
    if which is not None and sum(foreign) == sum(foreign[which]):
        return _apply(eqn, values[which], walk, line, lambda *xs: move(eqn, values, which, xs))
    fits = rule is not None and (rule.fits(eqn) or (_plain(values) and rule.fits_plain(eqn)))
    if rule is not None and fits:
        numbers = functools.partial(_numbers, number=walk.number)
        by_rule = lambda *xs: _typed(eqn, rule.apply(eqn, numbers, *xs))  # noqa: E731
        return _apply(eqn, values, walk, line, by_rule)
    if walk.missing is not None:
        walk.missing.append(_describe(eqn, line))
    return [Foreign(None, plain=False) for _ in eqn.outvars]


def _plain(values: Sequence[Value]) -> bool:
    return all(x.plain for x in values if isinstance(x, Foreign))


def _typed(eqn: core.JaxprEqn, out: Any) -> Any:
    """Give integers of NumPy the dtype that they have in JAX: NumPy sums int8 to int64."""
    wanted = np.dtype(aval_of(eqn.outvars[0]).dtype)
    ours = isinstance(out, np.ndarray | np.generic) and out.dtype.kind in "iu"
    return out.astype(wanted) if ours and wanted.kind in "iu" else out


def _apply(
    eqn: core.JaxprEqn,
    values: Sequence[Value],
    walk: Walk,
    line: str | None,
    rule: Callable[..., Any],
) -> list[Value]:
    """Compute an equation by a rule, and see that it gave what JAX would give the shape of."""
    if walk.missing is not None:
        return [Foreign(None, _plain(values)) for _ in eqn.outvars]
    try:
        outs = rule(*_operands(values, walk))
    except Exception as error:
        if all(isinstance(x, Foreign) or np.isfinite(np.asarray(x)).all() for x in values):
            raise
        raise ValueError(
            f"`export.replay` met a constant that is not finite in {_describe(eqn, line)}, and the "
            f"numbers that it goes with have none such ({type(error).__name__}: {error}). Mask "
            "with a finite number that is below all others, or by multiplication."
        ) from error
    outs = outs if isinstance(outs, list | tuple) else [outs]
    shapes = [tuple(getattr(x, "shape", ())) for x in outs]
    wanted = [tuple(aval_of(v).shape) for v in eqn.outvars]
    if shapes != wanted:
        raise ValueError(
            f"`export.replay` got {_listed(shapes)} from the rule of "
            f"{_describe(eqn, line)}, where JAX has {_listed(wanted)}. A rule gives "
            "what the primitive gives, or a list of several."
        )
    return [_foreign(x) for x in outs]


def _operands(values: Sequence[Value], walk: Walk) -> list[Any]:
    """What a rule sees of values: those that are known, in numbers that go with the others.

    Bools stay bools; beside integers of NumPy, integers stay what they are, and wrap as in JAX.
    """
    foreign = [x.value for x in values if isinstance(x, Foreign)]
    whole = all(type(x) is np.ndarray and x.dtype.kind in "iub" for x in foreign)

    def operand(x: Value) -> Any:
        if isinstance(x, Foreign):
            return x.value
        known = np.asarray(x)
        kept = known.dtype == bool or (whole and known.dtype.kind in "iu")
        return known if kept else _numbers(known, walk.number)

    return [operand(x) for x in values]


def _numbers(known: np.ndarray, number: Callable[[float], Any] | None) -> np.ndarray:
    """An array of ours in numbers of the user's kind, or in float64."""
    floats = known.astype(np.float64)
    if number is None:
        return floats
    numbers = np.empty(floats.shape, object)
    for place, entry in np.ndenumerate(floats):
        numbers[place] = number(float(entry))
    return numbers


def _scan(params: Any, values: Sequence[Value], walk: Walk, line: str | None) -> list[Value]:
    """Run the body of a loop, step by step, on slices of what it walks along."""
    body, (n, k), length = params["jaxpr"], scan_sizes(params), params["length"]
    fixed, carry, rows = values[:n], list(values[n : n + k]), values[n + k :]
    steps, made = range(length), []
    for i in reversed(steps) if params["reverse"] else steps:
        here = [_row(x, i) for x in rows]
        outs = _run(body.jaxpr, body.consts, [*fixed, *carry, *here], walk, line)
        carry = outs[:k]
        made.append(outs[k:])
    if not made:  # a loop without steps stacks nothing
        return [*carry, *(np.zeros((0, *x.shape), x.dtype) for x in body.out_avals[k:])]
    order = made[::-1] if params["reverse"] else made
    return [*carry, *(_stacked(each, walk) for each in zip(*order, strict=True))]


def _row(x: Value, i: int) -> Value:
    if not isinstance(x, Foreign):
        return x[i]
    return x if x.value is None else _foreign(np.reshape(x.value[i : i + 1], x.value.shape[1:]))


def _stacked(rows: Sequence[Value], walk: Walk) -> Value:
    if not any(isinstance(row, Foreign) for row in rows):
        return jnp.stack(rows)
    if walk.missing is not None:
        return Foreign(None, _plain(rows))
    numbers = [np.reshape(x, (1, *x.shape)) for x in _operands(rows, walk)]
    return _foreign(np.concatenate(numbers))


def _describe(eqn: core.JaxprEqn, line: str | None) -> str:
    """Name a primitive, the line it is from, and the types it is of."""
    name = eqn.params.get("name", "") if eqn.primitive.name in CALLS else ""
    types = ", ".join(str(aval_of(v).dtype) for v in eqn.invars)
    to = aval_of(eqn.outvars[0]).dtype if eqn.outvars else "nothing"
    return f"`{name or eqn.primitive.name}` ({types} to {to}) at {line or 'an unknown line'}"


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes)) or "nothing"
