"""How PyTorch and equinox lay out weights: outputs before inputs."""

from jaxprune._layout import Layout
from jaxprune._where import NORMS
from jaxprune.layouts._rules import ELEMENTWISE, LOOKED_UP, gains, rule, unknown

_WEIGHT = r"(.*/)?weight"
_GPT2 = r"(c_attn|c_proj|c_fc|q_attn)/weight"
_CONV = r"(.*/)?(?!\w*(?i:transpose|deconv))\w*(?i:conv)\w*(/\d+)?/weight"
_EMBEDDING = r"(.*/)?(?i:(?!(un|de|patch))\w*(embed\w*|emb)|wte|wpe)/weight"

torch = Layout(
    (
        rule(rf"(?!(.*/)?{_GPT2}$){_WEIGHT}", "matmul", "out", "in"),
        *unknown(
            _WEIGHT, *(3, 4, 5, 6), why="so many axes have a stack of layers and a convolution"
        ),
        rule(r"(.*/)?(in_proj_weight|weight_[ih]h(_l\d+)?(_reverse)?)", "matmul", "out", "in"),
        rule(_CONV, "conv", "out", "in", "window"),
        rule(_CONV, "conv", "out", "in", "window", "window"),
        *unknown(
            r"(.*/)?\w*(?i:transpose|deconv)\w*(/\d+)?/weight",
            *(3, 4, 5),
            why="PyTorch has inputs first in a transposed convolution, equinox has outputs",
        ),
        *unknown(
            rf"(.*/)?{_GPT2}",
            2,
            why="the GPT-2 of transformers has inputs first here, and nanoGPT has outputs",
        ),
        rule(_EMBEDDING, "embedding", None, "out", why=LOOKED_UP),
        rule(_WEIGHT, "gain", None, why=ELEMENTWISE),
        *gains(rf"(.*/)?{NORMS}/weight"),
        rule(r"(.*/)?bias", "bias", None, why=ELEMENTWISE),
    )
)
