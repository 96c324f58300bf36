"""What sparse weights of a LiteRT file weigh, and how fast they are, beside dense ones.

    python -m benchmarks.tflite
    python -m benchmarks.tflite --sizes 4096x1024 --rows 1 16 64

One fully connected layer on one thread, as the runtime is by default: dense weights are multiplied
by XNNPACK, sparse ones by the runtime itself, unless they are unpacked when the file is loaded.
Ratios of bytes and of seconds over those of the dense file, in turns.
"""

import dataclasses
import importlib.metadata
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

import jaxprune as jp
from benchmarks.common import Task, in_turns, machine, paired_ratio, print_table, write_json
from experiments import need

KINDS: dict[str, tuple[int, str]] = {
    "single weights": (1, "sparse"),
    "blocks of 1 x 4": (4, "sparse"),
    "single weights, unpacked": (1, "dense"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      sizes: outputs x inputs of the layer.
      sparsities: fractions of the weights that are removed.
      rows: of the data.
      turns: of every contestant.
      seed: of weights and data.
      out: JSON file to write.
    """

    sizes: tuple[str, ...] = ("512x256", "1024x1024")
    sparsities: tuple[float, ...] = (0.5, 0.75, 0.9, 0.95)
    rows: tuple[int, ...] = (1, 16)
    turns: int = 25
    seed: int = 0
    out: Path = Path("results/benchmarks/tflite.json")


def pruned(rng: np.random.Generator, size: str, sparsity: float, block: int) -> np.ndarray:
    """Draw weights `[outputs, inputs]` and remove blocks of inputs."""
    outputs, inputs = map(int, size.split("x"))
    kernel = {"w": jnp.asarray(rng.standard_normal((inputs, outputs), np.float32))}
    masks = jp.find_masks(kernel, sparsity, pattern=jp.patterns.Blocks((block, 1)))
    return np.ascontiguousarray(np.asarray(jp.apply_masks(kernel, masks)["w"]).T)


def task(path: Path, rows: int, inputs: int, times: int, rng: np.random.Generator) -> Task:
    """Load a file, and make what runs it a number of times: one call is some microseconds."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    values = rng.standard_normal((rows, inputs), np.float32)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], values)

    def call() -> None:
        for _ in range(times):
            interpreter.invoke()

    return call


def cases(config: Config, folder: Path) -> Iterator[dict[str, Any]]:
    """Time both kinds beside the dense layer, by size, share of zeros and rows."""
    from benchmarks import litert

    for size in config.sizes:
        for sparsity in config.sparsities:
            for rows in config.rows:
                rng = np.random.default_rng(config.seed)
                tasks, found = {}, {}
                for kind, (block, compute) in KINDS.items():
                    w = pruned(rng, size, sparsity, block)
                    source = litert.write(folder / "dense.tflite", litert.mlp(w, batch=rows))
                    report = jp.export.sparsify_tflite(
                        folder / "sparse.tflite",
                        source,
                        block=(1, block),
                        compute=compute,
                        latency=(),
                    )
                    found[kind] = report.bytes / report.dense_bytes, report.parity
                    times = max(1, 50_000_000 // (rows * w.size))
                    tasks[kind] = task(report.path, rows, w.shape[1], times, rng)
                    tasks["dense"] = task(source, rows, w.shape[1], times, rng)
                seconds = in_turns(tasks, turns=config.turns)
                for kind, (weight, parity) in found.items():
                    yield {
                        **{"size": size, "sparsity": sparsity, "rows": rows, "kind": kind},
                        **{"bytes_over_dense": weight, "parity": parity},
                        "time_over_dense": paired_ratio(
                            seconds[kind], seconds["dense"], seed=config.seed
                        ),
                    }


def show(config: Config, found: list[dict[str, Any]]) -> None:
    """A table for each size: the rows of the data side by side."""
    for size in config.sizes:
        lines: dict[tuple[str, ...], list[str]] = {}
        for case in (case for case in found if case["size"] == size):
            name = f"{case['kind']}, {case['sparsity']:.0%} removed"
            ratio = case["time_over_dense"]
            words = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
            lines.setdefault((name, f"{case['bytes_over_dense']:.3f}"), []).append(words)
        print_table(
            f"LiteRT, a layer of {size}: sparse / dense, median [95 %]",
            ["weights", "bytes", *(f"time, {rows} rows" for rows in config.rows)],
            [[*key, *ratios] for key, ratios in lines.items()],
        )


def main(config: Config) -> dict[str, Any]:
    need("litert", "ai_edge_litert", "flatbuffers")
    settings = dataclasses.asdict(config)
    del settings["out"]  # says nothing about the numbers
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*stored weights with so few zeros")
        found = list(cases(config, Path(folder)))
    show(config, found)
    version = importlib.metadata.version("ai-edge-litert")
    result = {"machine": machine() | {"ai-edge-litert": version}, "config": settings}
    result["cases"] = found
    write_json(config.out, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
