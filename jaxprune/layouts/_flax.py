"""How flax, haiku and Keras lay out kernels: inputs before outputs."""

from jaxprune._layout import Layout
from jaxprune._where import NORMS
from jaxprune.layouts._rules import ELEMENTWISE, LOOKED_UP, gains, rule, unknown

_KERNEL = r"(.*/)?(kernel|w)"
_CONV = r"(.*/)?(?!\w*(?i:transpose))\w*(?i:conv)\w*/(kernel|w)"
_ATTENTION = r"(.*/)?(MultiHead\w*Attention|SelfAttention)(_\d+)?"  # as linen names its own

flax = Layout(
    (
        rule(_KERNEL, "matmul", "in", "out"),
        *unknown(
            _KERNEL,
            *(3, 4, 5, 6),
            why="so many axes have a stack of layers, a convolution and a kernel over heads",
        ),
        *unknown(
            r"(.*/)?\w*(?i:conv)\w*(?i:transpose)\w*/(kernel|w)",
            *(3, 4, 5),
            why="a transposed convolution has inputs or outputs first, by `transpose_kernel`",
        ),
        rule(_CONV, "conv", "window", "in", "out"),
        rule(_CONV, "conv", "window", "window", "in", "out"),
        rule(f"{_ATTENTION}/(query|key|value)/kernel", "matmul", "in", "out", "out"),
        rule(f"{_ATTENTION}/out/kernel", "matmul", "in", "in", "out"),
        rule(r"(.*/)?embeddings?", "embedding", None, "out", why=LOOKED_UP),
        rule(r"(.*/)?bias", "bias", None, why=ELEMENTWISE),
        *gains(rf"(.*/)?({NORMS}/(kernel|w)|scale)"),
    )
)
