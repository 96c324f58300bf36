"""Prune a language model in one pass over calibration data, beside llm-compressor.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python -m benchmarks.post_training
    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python -m benchmarks.post_training --smollm2

Both get the same arrays and the same tokens to calibrate on, and the same code here measures what
they give back. CPU seconds count every thread of the process and what is compiled on the way; the
flag above keeps XLA to one thread, as torch is kept here. By default that is a small llama after a
short training on the help of Python; ``--smollm2`` takes SmolLM2-135M-Instruct.
"""

import dataclasses
import functools
import importlib.metadata
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxprune as jp
from benchmarks.common import machine, print_table, write_json
from experiments.common import cost, data, llama, smollm2, tokens
from experiments.common.llama import Llama, Params
from experiments.common.tokens import Task

SMALL = Llama(data.SYMBOLS, width=64, layers=2, heads=4, kv_heads=2, inner=192)
KERNELS = {
    ("attention", "q"): "self_attn.q_proj",
    ("attention", "k"): "self_attn.k_proj",
    ("attention", "v"): "self_attn.v_proj",
    ("attention", "o"): "self_attn.o_proj",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
}
NORMS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
MODIFIERS = {"wanda": "WandaPruningModifier", "sparsegpt": "SparseGPTModifier"}
OURS, PEER = "jaxprune", "llm-compressor"
COMPARED = ("perplexity", "cpu_seconds")
TRAINING = 2048  # windows that the small network is trained on

Prune = Callable[[], Params]  # gives pruned weights, and waits for them


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      smollm2: take SmolLM2-135M-Instruct instead of a small network.
      methods: of ours; those that the peer has are compared.
      amount: a sparsity, or N:M as 2:4.
      text: a text, or an .npz of tokens; the help of Python if left out.
      calibration: windows to calibrate on.
      windows: windows that perplexities are of.
      length: tokens of a window (SmolLM2 512, a small network 64).
      steps: training steps of the small network.
      seed: of the small network.
      out: JSON file to write.
    """

    smollm2: bool = False
    methods: tuple[Literal["wanda", "sparsegpt", "admm"], ...] = ("wanda", "sparsegpt", "admm")
    amount: str = "0.5"
    text: Path | None = None
    calibration: int = 64
    windows: int = 20
    length: int | None = None
    steps: int = 300
    seed: int = 0
    out: Path = Path("results/benchmarks/post_training.json")


def load(config: Config) -> Task:
    """Load a network, and what it is calibrated and tested on."""
    if config.smollm2:
        net, params = smollm2.load()
        length, training, encode = config.length or 512, 0, smollm2.encode
    else:
        net, params = SMALL, llama.init(jax.random.key(config.seed), SMALL)
        length, training, encode = config.length or 64, TRAINING, data.encode
    text = tokens.load(
        config.text,
        encode,
        calibration=max(config.calibration, training),
        test=config.windows,
        length=length,
    )
    task = Task(net, jax.device_put(params), text)
    if training:
        task = task._replace(params=trained(config, task))
    return task._replace(text=text._replace(calibration=text.calibration[: config.calibration]))


def trained(config: Config, task: Task) -> Params:
    """Train a network on the windows before those that it is tested on."""
    tx = optax.adam(3e-3)

    def loss(params: Params, batch: jax.Array) -> jax.Array:
        return jnp.mean(llama.losses(task.logits(params, batch[:, :-1]), batch[:, 1:]))

    @jax.jit
    def train(params: Params, batches: jax.Array) -> Params:
        def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, batch), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]

    windows = jnp.asarray(task.text.calibration)
    order = jax.random.randint(jax.random.key(config.seed), (config.steps, 16), 0, len(windows))
    return train(task.params, windows[order])


def ours(config: Config, task: Task) -> dict[str, Prune]:
    """Make what prunes by each of our methods."""
    fn = functools.partial(llama.hidden, net=task.net)
    sparsity, scope = tokens.amount(config.amount)

    def prune(method: str) -> Params:
        params, _ = jp.prune_trained(
            fn,
            task.params,
            task.batches,
            sparsity,
            method=getattr(jp.methods, method),
            scope=scope,
        )
        return jax.block_until_ready(params)

    return {method: functools.partial(prune, method) for method in config.methods}


def peers(config: Config, task: Task) -> dict[str, Prune]:
    """Make what prunes by llm-compressor, as its users call it."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers import pruning
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase

    torch.set_num_threads(1)
    rows = [{"input_ids": torch.tensor(row).long()} for row in task.text.calibration]
    sparsity, scope = tokens.amount(config.amount)
    structure = "0:0"
    if scope is not None:  # its N counts what goes
        kept, m = map(int, config.amount.split(":"))
        structure = f"{m - kept}:{m}"

    def prune(model: Any, modifier: Any) -> Params:
        recipe = modifier(
            sparsity=sparsity,
            mask_structure=structure,
            targets=["Linear"],
            ignore=["re:.*lm_head"],
        )
        with tempfile.TemporaryDirectory() as folder:  # where it looks for the config again
            model.config.save_pretrained(folder)
            model.config.name_or_path = folder
            oneshot(
                model=model,
                dataset=DataLoader(rows),
                processor=PreTrainedTokenizerBase(),  # is asked for, and not used
                recipe=recipe,
            )
        return from_torch(model, task.params)

    check_same(task, in_torch(task))
    return {
        method: functools.partial(prune, in_torch(task), getattr(pruning, MODIFIERS[method]))
        for method in config.methods
        if method in MODIFIERS
    }


def in_torch(task: Task) -> Any:
    """Build the network of transformers with the same arrays."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    net, params = task.net, task.params
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=net.vocabulary,
            hidden_size=net.width,
            intermediate_size=net.inner,
            num_hidden_layers=net.layers,
            num_attention_heads=net.heads,
            num_key_value_heads=net.kv_heads,
            rms_norm_eps=net.epsilon,
            rope_parameters={"rope_theta": net.theta, "rope_type": "default"},
            tie_word_embeddings=True,
        )
    )
    model.model.embed_tokens.weight.data = torch.tensor(np.asarray(params["embedding"]))
    model.model.norm.weight.data = torch.tensor(np.asarray(params["norm"]["scale"]))
    for i, layer in enumerate(model.model.layers):
        for branch, name in NORMS.items():
            scale = params["layers"][branch]["norm"]["scale"][i]
            layer.get_submodule(name).weight.data = torch.tensor(np.asarray(scale))
        for (branch, kernel), name in KERNELS.items():
            array = np.asarray(params["layers"][branch][kernel]["kernel"][i])
            layer.get_submodule(name).weight.data = torch.tensor(array.T.copy())
    return model.eval()


def from_torch(model: Any, params: Params) -> Params:
    """Read the kernels back; all else is as it was."""
    layers = {branch: dict(kernels) for branch, kernels in params["layers"].items()}
    for (branch, kernel), name in KERNELS.items():
        rows = [layer.get_submodule(name).weight.detach().numpy().T for layer in model.model.layers]
        layers[branch][kernel] = {"kernel": jnp.asarray(np.stack(rows))}
    return {**params, "layers": layers}


def check_same(task: Task, model: Any) -> None:
    """See whether both frameworks compute the same logits from the same arrays.

    Raises:
      RuntimeError: they do not.
    """
    import torch

    window = task.text.test[:1]
    ours = np.asarray(task.logits(task.params, jnp.asarray(window)))
    with torch.no_grad():
        theirs = model(torch.tensor(window).long()).logits.numpy()
    if not np.allclose(ours, theirs, atol=1e-3, rtol=1e-3):
        raise RuntimeError(f"the frameworks differ by {np.abs(ours - theirs).max():.2g} in a logit")


def main(config: Config) -> dict[str, Any]:
    task = load(config)
    contestants = {(method, OURS): prune for method, prune in ours(config, task).items()}
    try:
        contestants |= {(method, PEER): prune for method, prune in peers(config, task).items()}
    except ImportError as error:
        print(
            f"Skipped {PEER}, which is not there to compare with ({error}). Install the optional "
            "peer with `pip install llmcompressor==0.14.0.1` and run this again."
        )
    dense = perplexity(task, task.params)
    cases = []
    for (method, tool), prune in contestants.items():
        params, spent = cost.measured(prune)
        found = {"perplexity": perplexity(task, params), "zeros": zeros(params)}
        cases.append({"method": method, "tool": tool, **found, **dataclasses.asdict(spent)})
    return report(config, dense, cases)


def perplexity(task: Task, params: Params) -> float:
    """Measure the perplexity of the windows to be tested on."""
    return float(np.exp(np.mean(tokens.losses(task.logits, params, task.text.test))))


def zeros(params: Params) -> float:
    """Give the fraction of zeros in all kernels."""
    found = [params["layers"][branch][kernel]["kernel"] for branch, kernel in KERNELS]
    return float(sum(jnp.sum(w == 0) for w in found) / sum(w.size for w in found))


def report(config: Config, dense: float, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Print the table, write the file, and give what is in it."""
    by_name = {(case["method"], case["tool"]): case for case in cases}
    ratios = {
        method: {key: by_name[method, OURS][key] / by_name[method, PEER][key] for key in COMPARED}
        for method in config.methods
        if (method, PEER) in by_name
    }
    print_table(
        f"{'SmolLM2' if config.smollm2 else 'a small llama'} at {config.amount}, "
        f"{config.calibration} windows to calibrate on; dense perplexity {dense:.4g}",
        ["method", "tool", "perplexity", "CPU s", "GB above the start", "zeros [%]"],
        [
            [
                case["method"],
                case["tool"],
                f"{case['perplexity']:.4g}",
                f"{case['cpu_seconds']:.1f}",
                f"{case['above_gb']:.2f}",
                f"{100 * case['zeros']:.2f}",
            ]
            for case in cases
        ],
    )
    for method, ratio in ratios.items():
        print(f"{method}: " + ", ".join(f"{key} {ratio[key]:.3f}" for key in COMPARED))
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "text")}
    versions = {"torch": _version("torch"), PEER: _version("llmcompressor")}
    result = {
        "machine": machine() | {name: found for name, found in versions.items() if found},
        "config": settings,
        "dense_perplexity": dense,
        "cases": cases,
        "ours_over_peer": ratios,
    }
    write_json(config.out, result)
    return result


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(tyro.cli(Config))
