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

import jaxprune as jp

MODEL = Path(__file__).with_name("model_format_1.safetensors")
RUN = Path(__file__).with_name("run_format_1.zip")


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


if __name__ == "__main__":
    jp.checkpoint.save(MODEL, *model())
    with tempfile.TemporaryDirectory() as folder:
        jp.checkpoint.save_run(Path(folder, "run"), 3, run(), config={"rate": 0.2})
        shutil.make_archive(str(RUN.with_suffix("")), "zip", folder)
