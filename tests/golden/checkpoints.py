"""Make the golden checkpoints: ``python -m tests.golden.checkpoints``, from the root.

They are files that an earlier version wrote, and stay as they are: make them only when the format
changes, under new names.
"""

import shutil
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import optax

import jaxprune as jp

MODEL = Path(__file__).with_name("model_format_1.safetensors")
RUN = Path(__file__).with_name("run_format_1.zip")
BLOCKS = Path(__file__).with_name("run_of_blocks_format_1.zip")  # its state had a bit a weight


def model():
    """A tree with one leaf of each sort, and masks."""
    params = {
        "dense": {
            "kernel": np.arange(1, 25, dtype=np.float32).reshape(4, 6),
            "bias": np.arange(6, dtype=ml_dtypes.bfloat16),
        },
        "layers": [{"kernel": -np.arange(1.0, 9.0, dtype=np.float16).reshape(2, 4)}],
        "key": np.uint32([1, 2]),
        "rate": 0.5,
    }
    masks = {
        "dense": {"kernel": np.arange(24).reshape(4, 6) % 3 == 0, "bias": None},
        "layers": [{"kernel": np.array([[True, False, False, True]])}],
        "key": None,
        "rate": None,
    }
    return params, masks


def run():
    """What a run goes on from: numbers, masks in bits, random keys."""
    params, masks = model()
    return {"params": params, "masks": masks, "key": jax.random.key(7), "step": 3}


def blocks():
    """A state with masks of blocks in bits, and how it starts."""
    params = {"kernel": np.arange(80, dtype=np.float32).reshape(8, 10) * 7 % 81 - 40}
    pattern = jp.patterns.Blocks((2, 4))
    tx = jp.prune(
        optax.sgd(0.1, momentum=0.9),
        schedule=jp.schedules.constant(0.5),
        pattern=pattern,
        packed=True,
    )
    start = tx.init(params)
    return jp.with_masks(start, jp.find_masks(params, 0.5, pattern=pattern)), start


if __name__ == "__main__":
    jp.checkpoint.save(MODEL, *model())
    with tempfile.TemporaryDirectory() as folder:
        jp.checkpoint.save_run(Path(folder, "run"), 3, run(), config={"rate": 0.2})
        shutil.make_archive(str(RUN.with_suffix("")), "zip", folder)
    with tempfile.TemporaryDirectory() as folder:
        jp.checkpoint.save_run(Path(folder, "run"), 3, blocks()[0])
        shutil.make_archive(str(BLOCKS.with_suffix("")), "zip", folder)
