"""Windows of a tokenised text: some to calibrate on, others to be tested on."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from experiments.common import data, llama
from experiments.common.llama import Llama, Params

Logits = Callable[[Params, jax.Array], jax.Array]

AT_ONCE = 8  # windows of a batch that is calibrated on
ARRAYS = ("calibration_tokens", "eval_tokens")  # of a file of tokens


class Windows(NamedTuple):
    """Windows of a text, none of which overlap; both int32 `[windows, length]`."""

    calibration: np.ndarray
    test: np.ndarray


class Task(NamedTuple):
    """A network, and the windows to prune it by and to test it on."""

    net: Llama
    params: Params
    text: Windows

    @property
    def logits(self) -> Logits:
        """From params and tokens `[batch, length]` to logits."""
        return _logits(self.net)

    @property
    def batches(self) -> list[tuple[jax.Array]]:
        """What there is to calibrate on."""
        return batches(self.text.calibration, AT_ONCE)


def load(
    path: Path | None,
    encode: Callable[[str], np.ndarray],
    *,
    calibration: int,
    test: int,
    length: int,
) -> Windows:
    """Cut a text into windows: calibration takes the first, the test those that follow.

    Args:
      path: a text in UTF-8, or an .npz with the arrays of ``ARRAYS``, whose first windows are
        taken; None stands for the help that comes with Python.
      encode: from a text to tokens.
      calibration: windows to calibrate on.
      test: windows to be tested on.
      length: tokens of a window.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is too short.
    """
    wanted = (calibration, test)
    if path is not None and not path.is_file():
        raise FileNotFoundError(
            f"No text at `text={str(path)!r}`. Name a text file in UTF-8, an .npz of tokens with "
            f"the arrays {' and '.join(ARRAYS)}, or leave it out for the help of Python."
        )
    if path is not None and path.suffix == ".npz":
        with np.load(path) as file:
            parts = [file[name][:, :length].astype(np.int32) for name in ARRAYS]
    else:
        codes = encode(data.python_help() if path is None else path.read_text(encoding="utf-8"))
        whole = codes[: len(codes) // length * length].reshape(-1, length)
        parts = [whole[:calibration], whole[calibration:]]
    if any(len(part) < n or part.shape[1] < length for part, n in zip(parts, wanted, strict=True)):
        found = " and ".join(f"{len(part)} x {part.shape[1]}" for part in parts)
        raise ValueError(
            f"`text={str(path)!r}` gives {found} tokens to calibrate on and to be tested on, but "
            f"{calibration} x {length} and {test} x {length} are wanted. Take a longer text, or "
            f"fewer windows."
        )
    return Windows(*(part[:n] for part, n in zip(parts, wanted, strict=True)))


def amount(written: str) -> tuple[float, Any]:
    """Read a sparsity, or N:M; give the sparsity and the scope, None for the method's own.

    >>> amount("0.6"), amount("2:4")[0]
    ((0.6, None), 0.5)
    """
    if ":" not in written:
        return float(written), None
    kept, m = map(int, written.split(":"))
    return 1 - kept / m, jp.scopes.windows(m)


def batches(windows: np.ndarray, size: int) -> list[tuple[jax.Array]]:
    """Cut windows `[n, length]` into tuples of one array of at most ``size`` of them."""
    return [(jnp.asarray(windows[i : i + size]),) for i in range(0, len(windows), size)]


def losses(logits: Logits, params: Params, windows: np.ndarray) -> list[float]:
    """Give the mean negative log-likelihood in nats of each window, four windows at a time."""
    return [float(n) for (part,) in batches(windows, 4) for n in _of_windows(logits, params, part)]


@functools.partial(jax.jit, static_argnums=0)
def _of_windows(logits: Logits, params: Params, tokens: jax.Array) -> jax.Array:
    return jnp.mean(llama.losses(logits(params, tokens[:, :-1]), tokens[:, 1:]), axis=-1)


@functools.cache
def _logits(net: Llama) -> Logits:
    """One function for each network, so that its programs are compiled once."""
    return functools.partial(llama.logits, net=net)
