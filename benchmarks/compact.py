"""How much faster a product, a network and its training are if only kept blocks are computed.

    python -m benchmarks.compact
    python -m benchmarks.compact --sizes 4096 --sparsities 0.875 --rows 512 --no-network

Ratios in one run: seconds of the dense product over those of the product with what is left of the
matrix, each block column of which has kept as many blocks; forward, and forward with both
gradients. Then a transformer whose projections are pruned in such blocks, whole, and a step of Adam
on it. Bytes are those of the kept blocks with four for an index. On an accelerator a call is a
chain of products, each with weights of its own, so that neither a call's overhead is timed nor
weights that lie in a cache.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxprune as jp
from benchmarks.common import Task, in_turns, machine, paired_ratio, print_table, write_json
from jaxprune.graph._block_product import block_product

CHAIN, CALLS = 16, 4  # products of a call, and calls that nobody waits for, on an accelerator
WAYS = ("forward", "forward and backward")
PROJECTIONS = "q|k|v|o|up|down"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      sizes: inputs of the matrices, which have as many outputs.
      sparsities: fractions of the blocks that are removed.
      blocks: inputs x outputs of a block.
      rows: of the data.
      ways: forward, forward and backward.
      dtype: of everything; auto is float32 on a CPU, else bfloat16.
      network: whether to time the transformer.
      width: of the transformer.
      layers: of the transformer, which are scanned over.
      batch: sequences of a batch, and tokens of each.
      network_blocks: sides of the blocks of the transformer.
      turns: of every contestant.
      seed: of weights and indices.
      out: JSON file to write.
    """

    sizes: tuple[int, ...] = (4096, 1024)
    sparsities: tuple[float, ...] = (0.75, 0.875, 0.9375)
    blocks: tuple[str, ...] = ("128x128", "16x128", "64x64", "16x16")
    rows: tuple[int, ...] = (1, 64, 512)
    ways: tuple[Literal["forward", "forward and backward"], ...] = WAYS
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    network: bool = True
    width: int = 1024
    layers: int = 4
    batch: tuple[int, int] = (8, 128)
    network_blocks: tuple[int, ...] = (64, 128)
    turns: int = 7
    seed: int = 0
    out: Path = Path("results/benchmarks/compact.json")


def dtype_of(config: Config) -> jnp.dtype:
    """The dtype of all arrays."""
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(auto if config.dtype == "auto" else config.dtype)


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def draw_blocks(
    rng: np.random.Generator, size: int, sparsity: float, block: str, dtype: jnp.dtype
) -> tuple[jax.Array, np.ndarray]:
    """Blocks that are left of a random matrix, and where they were: as many a column."""
    bi, bo = map(int, block.split("x"))
    rows, columns = size // bi, size // bo
    kept = max(1, round((1 - sparsity) * rows))
    index = np.argsort(rng.random((columns, rows)), axis=1)[:, :kept]
    blocks = rng.standard_normal((columns, kept, bi, bo), np.float32) / np.sqrt(kept * bi)
    return jnp.asarray(blocks, dtype), np.sort(index, axis=1).astype(np.int32)


def chained(indices: list[np.ndarray | None], way: str) -> Callable[..., Any]:
    """Products one after another, of blocks where there is an index; perhaps with gradients."""

    def forward(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        for w, index in zip(weights, indices, strict=True):
            x = x @ w if index is None else block_product(x, w, jnp.asarray(index))
        return x

    def both(x: jax.Array, weights: list[jax.Array]) -> Any:
        y, back = jax.vjp(forward, x, weights)
        return back(y)

    return forward if way == "forward" else both


def task(fn: Callable[..., Any], *args: Any) -> Task:
    """Compile a function, and make what calls it and waits; on an accelerator a few times."""
    run = jax.jit(fn).lower(*args).compile()
    calls = 1 if on_cpu() else CALLS

    def call() -> None:
        jax.block_until_ready([run(*args) for _ in range(calls)][-1])

    return call


def products(config: Config) -> Iterator[dict[str, Any]]:
    """Time all kinds of blocks beside the dense product, by size, rows and way."""
    dtype = dtype_of(config)
    chain = 1 if on_cpu() else CHAIN
    for size in config.sizes:
        rng = np.random.default_rng(config.seed)
        matrix = lambda rng=rng, size=size: rng.standard_normal((size, size), np.float32)  # noqa: E731
        dense = [jnp.asarray(matrix() / np.sqrt(size), dtype) for _ in range(chain)]
        kinds: dict[tuple[float, str], Any] = {
            (sparsity, block): [
                draw_blocks(rng, size, sparsity, block, dtype) for _ in range(chain)
            ]
            for sparsity in config.sparsities
            for block in config.blocks
        }
        for rows in config.rows:
            x = jnp.asarray(rng.standard_normal((rows, size), np.float32), dtype)
            for way in config.ways:
                tasks = {"dense": task(chained([None] * chain, way), x, dense)}
                for kind, parts in kinds.items():
                    fn = chained([index for _, index in parts], way)
                    tasks[str(kind)] = task(fn, x, [blocks for blocks, _ in parts])
                seconds = in_turns(tasks, turns=config.turns)
                for kind, parts in kinds.items():
                    ratio = paired_ratio(seconds["dense"], seconds[str(kind)], seed=config.seed)
                    yield {
                        **{"size": size, "rows": rows, "way": way},
                        **{"sparsity": kind[0], "blocks": kind[1]},
                        "bytes_over_dense": bytes_of(parts[0]) / dense[0].nbytes,
                        "dense_over_blocks": ratio,
                    }


def bytes_of(part: tuple[jax.Array, np.ndarray]) -> int:
    """Bytes of kept blocks, with four for each index."""
    blocks, index = part
    return blocks.nbytes + 4 * index.size


def transformer_params(config: Config, key: jax.Array) -> dict[str, Any]:
    """Random weights of a transformer over bytes, its layers stacked."""
    d, n = config.width, config.layers
    shapes = {**dict.fromkeys("qkvo", (n, d, d)), "up": (n, d, 4 * d), "down": (n, 4 * d, d)}
    keys = jax.random.split(key, len(shapes) + 2)
    dtype = dtype_of(config)

    def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return (jax.random.normal(key, shape) / np.sqrt(shape[-2])).astype(dtype)

    layers = {name: normal(k, s) for k, (name, s) in zip(keys, shapes.items(), strict=False)}
    return {
        "embedding": normal(keys[-1], (256, d)),
        "layers": {**layers, "norm": jnp.ones((n, 2, d), dtype)},
        "head": normal(keys[-2], (d, 256)),
    }


def transformer(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Logits `[batch, tokens, 256]`; heads are 64 wide."""

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale[None, None]

    def layer(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        y = norm(x, p["norm"][0])
        q, k, v = ((y @ p[name]).reshape(*y.shape[:2], -1, 64) for name in "qkv")
        scores = jnp.einsum("bthk,bshk->bhts", q, k) / 8  # the root of 64
        seen = jax.nn.softmax(jnp.where(past, scores, -jnp.inf))
        x = x + jnp.einsum("bhts,bshk->bthk", seen, v).reshape(x.shape) @ p["o"]
        y = norm(x, p["norm"][1])
        return x + jax.nn.gelu(y @ p["up"]) @ p["down"], None

    past = jnp.tri(tokens.shape[1], dtype=bool)[None, None]
    x, _ = jax.lax.scan(layer, params["embedding"][tokens], params["layers"])
    return x @ params["head"]


def step(
    fn: Callable[..., jax.Array], tx: optax.GradientTransformation, tokens: jax.Array
) -> Callable[[Any, Any], Any]:
    """A step of training to tell the next token."""

    def loss(params: Any) -> jax.Array:
        logits = fn(params, tokens).astype(jnp.float32)
        seen = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.mean(seen)

    def update(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return update


def networks(config: Config) -> Iterator[dict[str, Any]]:
    """Time the transformer and a step of training beside the dense ones, by sides of blocks."""
    params = transformer_params(config, jax.random.key(config.seed))
    tokens = jax.random.randint(jax.random.key(config.seed + 1), config.batch, 0, 256)
    tx = optax.adam(1e-3)
    find = functools.partial(
        jp.find_masks,
        params,
        scope=jp.scopes.per_output,
        layout=jp.find_layout(transformer, params, tokens),
        where=jp.by_path(f"layers/({PROJECTIONS})"),
    )
    for sparsity in config.sparsities:
        contestants: dict[str, Any] = {"dense": (transformer, params)}
        for side in config.network_blocks:
            pattern = jp.patterns.Blocks((side, side), axes=("in", "out"))
            masks = find(sparsity, pattern=pattern)
            contestants[f"{side}x{side}"] = jp.compact(
                transformer, params, masks, only=f"layers/({PROJECTIONS})"
            )
        infer, train = {}, {}
        for name, (fn, tree) in contestants.items():
            infer[name] = task(fn, tree, tokens)
            train[name] = task(step(fn, tx, tokens), tree, tx.init(tree))
        for way, tasks in (("forward", infer), ("training step", train)):
            seconds = in_turns(tasks, turns=config.turns)
            for name in list(contestants)[1:]:
                ratio = paired_ratio(seconds["dense"], seconds[name], seed=config.seed)
                found = {"way": way, "sparsity": sparsity, "blocks": name}
                yield {**found, "dense_over_blocks": ratio}


def words(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def show_products(config: Config, cases: list[dict[str, Any]]) -> None:
    """A table for each way: the rows of the data side by side."""
    for way in dict.fromkeys(case["way"] for case in cases):
        lines: dict[tuple[str, ...], list[str]] = {}
        for case in (case for case in cases if case["way"] == way):
            name = f"{case['size']} x {case['size']}, {case['sparsity']:.2%} removed"
            key = (f"{name}, {case['blocks']}", f"{case['bytes_over_dense']:.4f}")
            lines.setdefault(key, []).append(words(case["dense_over_blocks"]))
        print_table(
            f"Dense / blocks, {way}, {dtype_of(config)}, median [95 %]",
            ["matrix", "bytes", *(f"{rows} rows" for rows in config.rows)],
            [[*key, *ratios] for key, ratios in lines.items()],
        )


def show_networks(config: Config, cases: list[dict[str, Any]]) -> None:
    sequences, tokens = config.batch
    print_table(
        f"Dense / blocks, a transformer of {config.layers} x {config.width}, "
        f"{sequences} x {tokens} tokens, median [95 %]",
        ["network", "dense / blocks"],
        [
            [
                f"{case['way']}, {case['sparsity']:.2%} removed, {case['blocks']}",
                words(case["dense_over_blocks"]),
            ]
            for case in cases
        ],
    )


def main(config: Config) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    del settings["out"]  # says nothing about the numbers
    result: dict[str, Any] = {"machine": machine(), "config": settings}
    result["dtype"] = dtype_of(config).name
    result["products"] = list(products(config))
    show_products(config, result["products"])
    result["networks"] = list(networks(config)) if config.network else []
    if result["networks"]:
        show_networks(config, result["networks"])
    write_json(config.out, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
