"""Does a zero stay a zero: what other people's quantizers make of weights that were removed.

    python -m benchmarks.zeros

Weights `[256, 512]` of a normal distribution with one outlier, of which some share is removed, go
through the own code of each tool that is installed, there and back; the others are skipped by name.
Counted are the removed weights that are exactly 0 afterwards, and the kept ones that have become 0;
errors are those of the weights, relative, with and without the mask applied once more.
"""

import dataclasses
import importlib.metadata
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.common import machine, print_table, write_json
from benchmarks.zeros_modes import MODES, Mode
from benchmarks.zeros_tools import correlated, qwix_gptq, qwix_type


@dataclasses.dataclass(frozen=True)
class Config:
    """What to quantize.

    Attributes:
      sparsities: fractions of the weights that are removed.
      shape: outputs and inputs.
      outlier: one kept weight, in standard deviations of the others.
      tools: names to run; all where there are none.
      seed: of weights and of what is removed.
      out: JSON file to write.
    """

    sparsities: tuple[float, ...] = (0.5, 0.9)
    shape: tuple[int, int] = (256, 512)
    outlier: float = 10.0
    tools: tuple[str, ...] = ()
    seed: int = 0
    out: Path = Path("results/benchmarks/zeros.json")


def weights(config: Config, sparsity: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw weights `[out, in]`, and say which of them are removed."""
    rng = np.random.default_rng(config.seed)
    w = rng.normal(size=config.shape).astype(np.float32)
    removed = rng.random(w.shape) < sparsity
    removed[0, 0], w[0, 0] = False, config.outlier
    return np.where(removed, np.float32(0), w), removed


def measure(mode: Mode, config: Config, sparsity: float) -> dict[str, float]:
    """Send weights there and back, and compare."""
    w, removed = weights(config, sparsity)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = np.asarray(mode.run(w.copy()), np.float32)
    if got.shape != w.shape:
        raise RuntimeError(f"gives back {got.shape} for {w.shape}")
    return {
        "sparsity": sparsity,
        "zeros_kept": float(np.mean(got[removed] == 0)),
        "largest_residue": float(np.max(np.abs(got[removed]))),
        "kept_became_zero": float(np.mean(got[~removed] == 0)),
        "error": _error(got, w),
        "error_masked_again": _error(np.where(removed, 0, got), w),
    }


def _error(got: np.ndarray, w: np.ndarray) -> float:
    return float(np.linalg.norm(got - w) / np.linalg.norm(w))


def missing(mode: Mode) -> str:
    """Say why a tool cannot run; nothing if it can."""
    try:
        found = importlib.util.find_spec(mode.module)
    except ImportError:
        found = None
    return "" if found else f"`{mode.package}` is not installed"


def main(config: Config) -> dict[str, Any]:
    known = list(dict.fromkeys(mode.tool for mode in MODES))
    unknown = [tool for tool in config.tools if tool not in known]
    if unknown:
        raise ValueError(f"`--tools` got {unknown}, which are unknown. There are {known}.")
    cases: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for mode in MODES:
        if config.tools and mode.tool not in config.tools:
            continue
        reason = missing(mode)
        if reason:
            skipped[mode.tool] = reason
            continue
        try:
            results = [measure(mode, config, sparsity) for sparsity in config.sparsities]
        except Exception as error:  # somebody else's code, of whatever version there is
            line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            skipped[f"{mode.tool}, {mode.name}"] = f"{type(error).__name__}: {line}"[:160]
            continue
        version = importlib.metadata.version(mode.package)
        cases.append({"tool": mode.tool, "version": version, "mode": mode.name, "results": results})
    _show(config, cases)
    ran = {(case["tool"], case["mode"]) for case in cases}
    outputs = masked_outputs(config) if ("qwix", "GPTQ int4") in ran else []
    for name, reason in skipped.items():
        print(f"Skipped {name}: {reason}.")
    settings = dataclasses.asdict(config)
    del settings["out"]
    result = {"machine": machine(), "config": settings, "cases": cases}
    result |= {"gptq_outputs": outputs, "skipped": skipped}
    write_json(config.out, result)
    return result


def masked_outputs(config: Config) -> list[dict[str, Any]]:
    """Errors of the products with inputs, for a quantizer that looks at them: before and after.

    GPTQ sends the errors of rounding into weights that come later, the removed ones among them.
    """
    cases = []
    for sparsity in config.sparsities:
        w, removed = weights(config, sparsity)
        x = correlated(w.shape[1])
        for kind in ("int8", "int4"):
            nearest, gptq = qwix_type(w, kind=kind), qwix_gptq(w, kind=kind)
            again = np.where(removed, 0, gptq)
            errors = [_error(got @ x, w @ x) for got in (nearest, gptq, again)]
            names = ("nearest", "GPTQ", "GPTQ, masked again")
            cases.append(
                {"sparsity": sparsity, "kind": kind} | dict(zip(names, errors, strict=True))
            )
    rows = [
        [f"{case[key]:.4f}" if key in names else str(case[key]) for key in case] for case in cases
    ]
    print_table("relative error of the outputs, qwix", ["removed", "kind", *names], rows)
    return cases


def _show(config: Config, cases: list[dict[str, Any]]) -> None:
    def cells(case: dict[str, Any], key: str, form: str) -> str:
        return " / ".join(form.format(result[key]) for result in case["results"])

    rows = [
        [
            f"{case['tool']} {case['version']}",
            case["mode"],
            cells(case, "zeros_kept", "{:.1%}"),
            cells(case, "largest_residue", "{:.0e}"),
            cells(case, "kept_became_zero", "{:.1%}"),
            cells(case, "error", "{:.3f}"),
            cells(case, "error_masked_again", "{:.3f}"),
        ]
        for case in cases
    ]
    print_table(
        f"{config.shape} weights of which {' / '.join(f'{s:.0%}' for s in config.sparsities)} "
        "are removed",
        [
            "quantized by",
            "mode",
            "zeros kept",
            "residue",
            "kept, became 0",
            "error",
            "masked again",
        ],
        rows,
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
