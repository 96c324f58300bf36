"""Which leaves are weights to prune: by shape and name, by regex, or all but some."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.typing import Layout, Where

# What a leaf is called whose zero is no zero of the network, or that no matrix product reads, in
# the libraries that users bring: flax, haiku, equinox, haliax, Keras, PyTorch, numpyro, HGQ.
# Single letters mind their case: `b` is haiku's bias, `B` the input matrix of a state space model.
_NAMES = {
    "LoRA factors": r"(?i:.*lora.*)",
    "biases": r"b\d*|b[qkvo]|(?i:(.*_)?bias(es)?(\d+|_\w|_[ih]h\w*)?|offset|beta|b_[ih]\w*)",
    "tables": (
        r"(?i:.*(pos|position|positional)(_?(emb|enc)\w*)?|.*(rel_?pos|relative_position)\w*"
        r"|(.*_)?(tokens?|cls|codebook|table|inv_freq)|rotary\w*|freqs\w*)"
    ),
    "embeddings": r"(?i:(?!(un|de|patch))(.*_)?\w*?(embeddings?|embeds?)\d*|(\w+_)?(emb|wte|wpe))",
    "gains and scales": (
        r"g|(?i:(.*_)?(scales?|gains?|gamma|alpha|lambda|norm|slopes?|sigma|tau|rho|decay|log_step|logvar|bits|zero_point)"
        r"(_?\d+|_re|_im)?|(weight|kernel)_g|layer_?scale\w*|ls_?\d|ln(_?\w{1,3})?|norm_weight|(\w+_)?log(_(std|var|sigma|scale|step|alpha|tau|decay))?"
        r"|time_(constants?|decay|first|mix\w*))"
    ),
    "statistics": r"(?i:((running|moving)_)?(mean|var|variance)|(.*_)?amax_history)",
}
_KERNEL = r"kernel|weight|w"
# Owners of what is called `weight` in equinox and PyTorch, and is a gain.
NORMS = (
    r"(?i:(?!dense|linear|conv)(.*norm\d*(_?\w{1,2})?|(ln|bn|gn|rms)(_?\w{1,6})?|\w+_(ln|bn)\d*))"
)
# A kernel's name may be that of something else, by what it belongs to: equinox and PyTorch call
# norms, embeddings and kernels the same. Each with the names that are in doubt, and the owners.
_OWNERS = {
    "gains and scales": (r"weight|w", NORMS),
    "embeddings": (
        r"weight",
        r"(?i:(?!(un|de|patch))\w*?(embed(dings?|s|ders?|_tokens)?\d*|emb|wte|wpe)|.*relative_attention_bias)",
    ),
}
_LORA = r"(?i:lora(_?(a|b|up|down))?)"  # whatever lies below it
# What a use makes of a leaf, nothing if a weight matrix, in the words for what names make of it;
# what is not read, or not known, is left to its name.
_KINDS = {
    "matmul": "",
    "conv": "",
    "embedding": "embeddings",
    "gain": "gains and scales",
    "bias": "biases",
    "derived": "derived",
    "table": "tables",
}
_ONLY_BY_NAME = ("LoRA factors", "widths of quantizers")  # no use tells those from kernels
# Ends of a path that say where a value lies in its container, not what it is.
_CONTAINERS = r"\d+|value|array|data_array|mantissa|raw_value|args|arr|tree"


def is_array(leaf: Any) -> bool:
    """True for arrays and what looks like one (numpy, abstract, traced); not for plain numbers."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_floating(leaf: Any) -> bool:
    """True for real floating arrays and what looks like one (numpy, abstract, traced)."""
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_matrix(path: str, array: jax.Array) -> bool:
    """Say whether a leaf is a weight matrix or kernel: the default of every ``where``.

    Kernels, heads included, are in. Embeddings, position tables, norms, gains and biases are out,
    and so are LoRA factors, whose zeros are no zeros of the weight. In detail, a leaf is in if it
    is floating, has at least two axes longer than 1 (a leaf called ``kernel``, ``weight`` or ``w``
    need only have two axes) and has no name that the libraries around JAX give to something else.
    ``jp.summary`` lists what is left out, and as what.

    A name is the last part of the path, without what only says where in a container it lies
    (``/0``, ``/value``). Trees without names go by shape alone, so that a bias ``[heads, dim]``
    is taken for a matrix: leave it out with ``jp.exclude``.

    Args:
      path: path of the leaf, as in ``Dense_0/kernel``.
      array: the leaf.

    Returns:
      Whether to prune it.

    Example:
      >>> import jax.numpy as jnp
      >>> is_matrix("Dense_0/kernel", jnp.ones((3, 4))), is_matrix("Dense_0/bias", jnp.ones(4))
      (True, False)
    """
    return not why_not(path, array)


def why_not(path: str, array: Any, layout: Layout = None) -> str:
    """Say as what a leaf is no weight matrix; nothing if it is one.

    Where a layout knows how the leaf is used, that decides instead of its name.
    """
    if not is_floating(array):
        return "not floating"
    shape = tuple(array.shape)
    if layout is None:
        return _by_name(path, shape)
    uses, shape = layout.uses(path, len(shape)), layout.of_layer(path, shape)
    named = _by_name(path, shape)
    known = [use.kind for use in uses if use.kind in _KINDS]
    if not known or named in _ONLY_BY_NAME:
        return named
    others = [_KINDS[kind] for kind in known if _KINDS[kind]]
    return others[0] if others else "vectors and scalars" if len(shape) < 2 else ""


def _by_name(path: str, shape: tuple[int, ...]) -> str:
    *owners, name = _words(path)
    if name == "b" and not owners:  # the second of two matrices as often as a bias
        name = ""
    if any(re.fullmatch(_LORA, owner) for owner in owners):
        return "LoRA factors"
    kernel = re.fullmatch(_KERNEL, name) is not None
    kind = _owned(name, owners[-1] if owners else "") if kernel else _named(name)
    if kind:
        return kind
    if any("quantizer" in word.lower() for word in (*owners, name)) and not kernel:
        return "widths of quantizers"
    long = sum(n != 1 for n in shape)
    if len(shape) < 2 or (long < 2 and not kernel):
        return "vectors and scalars"
    return ""


def _words(path: str) -> list[str]:
    """The parts of a path, down to the last that is a name.

    paramax wraps what it freezes in `tree` and what it normalizes in another `weight`, in any
    order: `embed/weight/tree/weight` is called `embed/weight`, as before it was wrapped.
    """
    first, *words = path.split("/")
    words = [first, *(word for word in words if word != "tree")]
    while len(words) > 1 and (
        re.fullmatch(_CONTAINERS, words[-1]) or words[-2:] == ["weight", "weight"]
    ):
        words.pop()
    return words


def name_of(path: str) -> str:
    """The last part of a path that is a name; a position in a tree without names."""
    return _words(path)[-1]


def _named(name: str) -> str:
    return next((kind for kind, regex in _NAMES.items() if re.fullmatch(regex, name)), "")


def _owned(name: str, owner: str) -> str:
    both = ((kind, *regexes) for kind, regexes in _OWNERS.items())
    return next((k for k, n, o in both if re.fullmatch(n, name) and re.fullmatch(o, owner)), "")


def everything(path: str, array: Any) -> bool:
    """Take every leaf: somebody has chosen before."""
    del path, array
    return True


@dataclasses.dataclass(frozen=True)
class ByPath:
    """The predicate that ``by_path`` makes; compares equal by its regexes, so jit caches hit."""

    regexes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"by_path({', '.join(map(repr, self.regexes))})"

    def __call__(self, path: str, array: Any) -> bool:
        del array
        return any(matches(regex, path) for regex in self.regexes)


def by_path(*regexes: str) -> Where:
    r"""Say by their path which leaves are prunable.

    A regex has to match the whole path; a path as it stands, brackets and all, matches itself.
    Leaves that are not floating arrays are left out whatever their path.

    Args:
      *regexes: regular expressions over paths such as ``Dense_0/kernel``; one has to match.

    Returns:
      A predicate for ``where``.

    Raises:
      ValueError: there is no regex, or one cannot be compiled. Where the predicate is used, a
        regex that matches no parameter is an error that lists the paths.

    Example:
      >>> where = by_path(r".*Dense_\d+/kernel", "head/.*")
      >>> where("encoder/Dense_0/kernel", None), where("Dense_0/bias", None)
      (True, False)
    """
    check_regexes(regexes, "by_path")
    return ByPath(regexes)


@dataclasses.dataclass(frozen=True)
class Exclude:
    """The predicate that ``exclude`` makes; compares equal by what it is made of."""

    regexes: tuple[str, ...]
    where: Where

    def __repr__(self) -> str:
        more = [] if by_default(self.where) else [f"where={self.where!r}"]
        return f"exclude({', '.join([*map(repr, self.regexes), *more])})"

    def __call__(self, path: str, array: Any) -> bool:
        return not self.protects(path) and self.where(path, array)

    def with_layout(self, layout: Layout) -> "Exclude":
        """Let what it takes leaves out of decide by use."""
        return dataclasses.replace(self, where=with_layout(self.where, layout))

    def protects(self, path: str) -> bool:
        """True for a leaf that a regex names."""
        return any(matches(regex, path) for regex in self.regexes)


def exclude(*regexes: str, where: Where = is_matrix) -> Where:
    r"""Leave leaves out of what another predicate takes.

    Args:
      *regexes: regular expressions over paths; what one of them matches whole is not pruned.
      where: which of the other leaves are prunable.

    Returns:
      A predicate for ``where``. With ``Coupled`` groups it protects those that own a part of an
      excluded leaf.

    Raises:
      ValueError: there is no regex, or one cannot be compiled. Where the predicate is used, a
        regex that matches no parameter is an error that lists the paths.

    Example:
      >>> import jax.numpy as jnp
      >>> where = exclude("(.*/)?head/.*")
      >>> where("Dense_0/kernel", jnp.ones((2, 2))), where("head/kernel", jnp.ones((2, 2)))
      (True, False)
    """
    check_regexes(regexes, "exclude")
    return Exclude(regexes, where)


@dataclasses.dataclass(frozen=True)
class ByUse:
    """The predicate that ``by_use`` makes."""

    kinds: tuple[str, ...]
    layout: Layout = None

    def __repr__(self) -> str:
        return f"by_use({', '.join(map(repr, self.kinds))})"

    def with_layout(self, layout: Layout) -> "ByUse":
        """Look uses up in a layout, if it was given none of its own."""
        return self if self.layout is not None else dataclasses.replace(self, layout=layout)

    def __call__(self, path: str, array: Any) -> bool:
        if self.layout is None:
            raise ValueError(
                f"`{self!r}` asks how a parameter is used, which only a layout knows. Pass "
                "`layout=jp.find_layout(fn, params, *inputs)` beside it, or to `by_use` itself."
            )
        uses = self.layout.uses(path, len(array.shape))
        return bool(uses) and all(use.kind in self.kinds for use in uses)


def by_use(*kinds: str, layout: Layout = None) -> Where:
    """Say by their use which leaves are prunable: those that are used so and not otherwise.

    Args:
      *kinds: ``"matmul"``, ``"conv"``, ``"embedding"``, ``"gain"``, ``"bias"``, ``"derived"``,
        ``"table"``, ``"unused"``, ``"unknown"``; see ``jp.Use``.
      layout: where uses are looked up; what takes a ``layout=`` itself hands its own in.

    Returns:
      A predicate for ``where``.

    Raises:
      ValueError: there is no kind, one is unknown, or comes twice; when used, there is no layout.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> layout = jp.Layout({"w": ("in", "out")})
      >>> where = by_use("matmul", "conv", layout=layout)
      >>> where("w", jnp.ones((2, 2))), where("v", jnp.ones((2, 2)))
      (True, False)
    """
    for kind in kinds:
        if kind not in (*_KINDS, "unused", "unknown"):
            raise ValueError(
                f"`by_use` got {kind!r}, which is no use of a parameter. There are "
                f"{', '.join(map(repr, (*_KINDS, 'unused', 'unknown')))}."
            )
    if not kinds or len(set(kinds)) < len(kinds):
        wrong = "no use" if not kinds else f"a use twice: {', '.join(map(repr, kinds))}"
        raise ValueError(f'`by_use` got {wrong}. Name each once, as in `by_use("matmul", "conv")`.')
    if layout is not None and not hasattr(layout, "uses"):
        raise TypeError(
            f"`by_use` got layout={layout!r}. Pass `jp.find_layout(fn, params, *inputs)`, or leave "
            "it to what takes a `layout=` itself."
        )
    return ByUse(kinds, layout)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What ``is_matrix`` becomes where a layout says how leaves are used."""

    layout: Layout

    def __call__(self, path: str, array: Any) -> bool:
        return not why_not(path, array, self.layout)


def with_layout(where: Where, layout: Layout) -> Where:
    """Let a predicate decide by use, if it is one of those that can."""
    if layout is None:
        return where
    if where is is_matrix:
        return Kernels(layout)
    bound: Where = where.with_layout(layout) if hasattr(where, "with_layout") else where
    return bound


def by_default(where: Where) -> bool:
    """True for the default, with or without some leaves that are excluded from it."""
    if isinstance(where, Exclude):
        return by_default(where.where)
    return where is is_matrix or isinstance(where, Kernels)


def refuses(where: Where, path: str, array: Any) -> bool:
    """Tell whether a predicate protects a member of a coupled group.

    The default means "kernels" and says nothing of what hangs on them, biases and norms.
    """
    if where is is_matrix or isinstance(where, Kernels):
        return False
    if isinstance(where, Exclude):
        return where.protects(path) or refuses(where.where, path, array)
    return not where(path, array)


def regexes_of(where: Where) -> list[tuple[str, str]]:
    """The regexes of a predicate, each with the function it was given to."""
    if isinstance(where, ByPath):
        return [(regex, "by_path") for regex in where.regexes]
    if isinstance(where, Exclude):
        return [*((regex, "exclude") for regex in where.regexes), *regexes_of(where.where)]
    return []


def matches(regex: str, path: str) -> bool:
    """True for a regex that matches a whole path, and for the path itself, literally."""
    return regex == path or re.fullmatch(regex, path) is not None


def check_regexes(regexes: tuple[str, ...], user: str) -> None:
    """Refuse no regexes, and those that cannot be compiled, when a predicate is built."""
    if not regexes:
        raise ValueError(
            f"`{user}()` got no regex, so that nothing could match. Pass at least one, such as "
            f"`{user}('.*/kernel')`."
        )
    for regex in regexes:
        compile_regex(regex, user)


def compile_regex(regex: str, user: str) -> re.Pattern[str]:
    """Compile, or say which regex of which function is broken."""
    if not isinstance(regex, str):
        raise TypeError(
            f"`{user}` got {regex!r} of type {type(regex).__name__} as a regex. "
            "Pass a string, such as '.*/kernel'."
        )
    try:
        return re.compile(regex)
    except re.error as error:
        raise ValueError(
            f"`{user}` got {regex!r}, which is no regular expression: {error}. "
            "Escape special characters with a backslash, or a whole path with `re.escape(path)`."
        ) from error
