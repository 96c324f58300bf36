"""Ask the TPU compiler what pruning costs, without a TPU: ahead of time, on any machine.

    pip install -e '.[experiments,tpu-aot]'
    python -m benchmarks.tpu --rows prune rigl --dtypes bfloat16

Nothing runs: `libtpu` compiles training steps for a topology, and the figures are what it says of
its own programs, the same on every machine but for the seconds. The network is a scanned residual
MLP of 3.2 billion weights, its weights cut over the chips (FSDP), with Adam; every leaf is above
the 128 MiB of fast memory of a chip, below which figures are mostly what the compiler puts there.
"""

import dataclasses
import functools
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from benchmarks import hlo
from benchmarks.common import machine, print_table, write_json
from jaxprune.schedules._schedule import Schedule

LAYERS, WIDTH, HIDDEN, BATCH = 24, 4096, 16384, 2048
KERNELS, SMALL = 72, 256  # of the unrolled network, and their size
TURNS = 3  # of compiling it
LARGE = "v5e:16x16"  # what 70 billion weights fit
PARTS = ("unrolled", "llama")  # beside the rows of the table
COLUMNS = (
    *("step", "memory", "bytes", "between", "cycles", "aliased", "collectives"),
    *("wall s", "CPU s"),
)
LEGEND = """\
memory: temporaries above those of the bare step, in shards of the params.
bytes: accessed in a step with an event in it; between: in one whose schedule is never due, from
which the compiler drops the event (*: but for a search). Of a loop both count one round.
cycles: estimated, of a step between events; collectives have no estimate; ?: a loop does not tell
its rounds. aliased: donated buffers that the results are written to. collectives: what pruning
adds, and what a chip hands in to the largest."""
# Without these, the compiler asks the cloud where it runs, and a second process has to wait.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile.

    Attributes:
      rows: steps of the table to compile, and ``unrolled`` and ``llama``; all if none are named.
      dtypes: of weights and activations.
      topology: what to compile for, as ``v5e:2x4``.
      out: JSON file to write.
    """

    rows: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    topology: str = "v5e:2x4"
    out: Path = Path("results/benchmarks/tpu.json")


def wrappers() -> dict[str, optax.GradientTransformation]:
    """The rows of the table: Adam, and wrappers of it."""
    adam = optax.adam(1e-3)
    beat: Any = {"begin": 100, "end": 1000, "every": 100}
    rising = jp.schedules.cubic(0.9, **beat)
    windows = {"schedule": jp.schedules.cubic(0.5, **beat), "scope": jp.scopes.windows(4)}
    moving: Any = {"sparsity": 0.9, **beat}
    return {
        "bare": adam,
        "hold": jp.hold(adam),
        "prune": jp.prune(adam, schedule=rising),
        "across": jp.prune(adam, schedule=rising, scope=jp.scopes.across),
        "windows": jp.prune(adam, **windows),
        "channels": jp.prune(adam, schedule=rising, pattern=jp.patterns.Channels(-1)),
        "packed": jp.prune(adam, schedule=rising, packed=True),
        "taylor": jp.prune(adam, schedule=rising, criterion=jp.criteria.taylor),
        "fisher": jp.prune(adam, schedule=rising, criterion=jp.criteria.fisher),
        "straight_through": jp.straight_through(adam, schedule=rising),
        "rigl": jp.dynamic.rigl(adam, **moving),
        "set": jp.dynamic.set(adam, key=jax.random.key(0), **moving),
    }


class Compiled(NamedTuple):
    """A program and what its compiler says of it."""

    text: str
    figures: dict[str, float]


def topology_mesh(name: str) -> Mesh:
    """All chips of a topology in a row.

    Raises:
      RuntimeError: there is no TPU compiler, it does not load, or it does not know the topology.
    """
    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:  # whatever a compiler of another jax may raise
        raise RuntimeError(
            f"The TPU compiler did not make the topology {name!r}: {first_line(error)}. "
            "`pip install -e '.[tpu-aot]'` installs the libtpu of your jax; a topology is "
            "written as v5e:2x4."
        ) from error
    return Mesh(np.array(devices), ("data",))


def libtpu_version() -> str | None:
    """Version of the TPU compiler, on which all figures depend; None if it is not installed."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(":. ")


def cut(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Describe an array whose second to last axis is cut over the chips, if that goes evenly."""
    evenly = len(shape) > 1 and shape[-2] % mesh.size == 0
    spec = P(*[None] * (len(shape) - 2), "data") if evenly else P()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def scanned(dtype: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Params and batch of a residual MLP whose layers lie in two leaves."""
    params = {
        "up": cut((LAYERS, WIDTH, HIDDEN), dtype, mesh),
        "down": cut((LAYERS, HIDDEN, WIDTH), dtype, mesh),
    }
    return params, cut((BATCH, WIDTH), dtype, mesh)


def scanned_loss(params: Any, x: jax.Array) -> jax.Array:
    """Mean square of the outputs; activations are computed again on the way back."""

    @jax.checkpoint
    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        return x + jax.nn.relu(x @ w["up"]) @ w["down"], None

    y, _ = jax.lax.scan(layer, x, params)
    return jnp.mean(jnp.square(y.astype(jnp.float32)))


def unrolled(mesh: Mesh) -> tuple[Any, Any]:
    """Params and batch of a network of many small kernels, a leaf each."""
    params = {f"layer_{i}": cut((SMALL, SMALL), jnp.float32, mesh) for i in range(KERNELS)}
    return params, cut((BATCH, SMALL), jnp.float32, mesh)


def unrolled_loss(params: Any, x: jax.Array) -> jax.Array:
    for kernel in params.values():
        x = x + jax.nn.relu(x @ kernel)
    return jnp.mean(jnp.square(x))


def train(name: str, loss: Callable[[Any, Any], jax.Array], params: Any, batch: Any) -> Compiled:
    """Compile a step of training: forward, backward, update."""
    tx = wrappers()[name]

    def step(params: Any, state: Any, batch: Any) -> Any:
        seen = jp.forward_params(params, state) if name == "straight_through" else params
        grads = jax.grad(loss)(seen, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return compiled(step, params, started(tx, params), batch)


def started(tx: optax.GradientTransformation, params: Any) -> Any:
    """Describe the state at the start, cut like the params."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    return jax.tree.map(lambda s: cut(s.shape, s.dtype, mesh), jax.eval_shape(tx.init, params))


def compiled(step: Callable[..., Any], *args: Any) -> Compiled:
    """Compile a step that gives its first two arguments anew, into their own buffers."""
    wall, cpu = time.perf_counter(), time.process_time()
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
    seconds = {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }
    memory, text = program.memory_analysis(), program.as_text()
    assert text is not None and memory is not None
    figures = {
        "temporary_bytes": memory.temp_size_in_bytes,
        "bytes_accessed": program.cost_analysis()["bytes accessed"],
        "donated": len(jax.tree.leaves(args[:2])),
        "aliased": hlo.aliased(text),
    }
    return Compiled(text, figures | seconds)


def measure(name: str, dtype: Any, mesh: Mesh, bare: Compiled) -> dict[str, Any]:
    """Compile one row, with its event and with one that is never due; ratios to the bare step."""
    params, batch = scanned(dtype, mesh)
    with_event = train(name, scanned_loss, params, batch)
    # What is false when the program is made is folded away, the event with it.
    with mock.patch.object(Schedule, "due", lambda self, step: jnp.zeros((), bool)):
        between = train(name, scanned_loss, params, batch)
    program, bare_program = hlo.parse(with_event.text), hlo.parse(bare.text)
    mine, base = with_event.figures, bare.figures
    added = hlo.collectives(program) - hlo.collectives(bare_program)
    above = mine["temporary_bytes"] - base["temporary_bytes"]
    return {
        "row": name,
        "dtype": jnp.dtype(dtype).name,
        **mine,
        "temporary_shards": mine["temporary_bytes"] / shard_bytes(params),
        "temporary_above_bare": above / shard_bytes(params),
        "bytes_over_bare": mine["bytes_accessed"] / base["bytes_accessed"],
        "bytes_between_over_bare": between.figures["bytes_accessed"] / base["bytes_accessed"],
        "searches_left_between": hlo.searches(hlo.parse(between.text)),
        "cycles_over_bare": cycles_ratio(program, bare_program),
        "collectives_added": sum(added.values()),
        "kinds_added": sorted({kind for kind, _ in added}),
        "largest_added": max((size for _, size in added), default=0),
    }


def cycles_ratio(program: hlo.Program, bare: hlo.Program) -> float | None:
    """Cycles of a step between events over those of the bare one; None where they are not told."""
    try:
        return hlo.cycles(program) / hlo.cycles(bare)
    except ValueError:
        return None


def shard_bytes(params: Any) -> float:
    """Bytes of the params on one chip."""
    leaves = jax.tree.leaves(params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / leaves[0].sharding.mesh.size


def table(config: Config, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Compile all rows of the scanned network; one that does not compile says why."""
    names = [n for n in wrappers() if n != "bare" and (not config.rows or n in config.rows)]
    for dtype in map(jnp.dtype, config.dtypes if names else ()):
        bare = functools.cache(lambda d=dtype: train("bare", scanned_loss, *scanned(d, mesh)))
        for name in names:
            try:
                row = measure(name, dtype, mesh, bare())
            except Exception as error:  # the other rows are worth having
                row = {"row": name, "dtype": dtype.name, "error": first_line(error)}
            said = row.get("error") or f"{row['temporary_above_bare']:+.3f} shards"
            print(f"{dtype.name}: {name} {said}", flush=True)
            yield row


def many_leaves(mesh: Mesh) -> dict[str, Any]:
    """Compile a step of many small kernels for one chip, bare and pruned, in turns.

    The quickest turn counts: seconds are the only figures that are not always the same.
    """
    one = Mesh(mesh.devices[:1], mesh.axis_names)
    seconds: dict[str, list[float]] = {"bare": [], "prune": []}
    for _ in range(TURNS):
        for name, taken in seconds.items():
            step = train(name, unrolled_loss, *unrolled(one))
            taken.append(step.figures["cpu_seconds"])
    least = {f"{name}_cpu_seconds": min(taken) for name, taken in seconds.items()}
    over = least["prune_cpu_seconds"] / least["bare_cpu_seconds"]
    return {"kernels": KERNELS, **least, "cpu_over_bare": over}


def llama(mesh: Mesh) -> dict[str, Any]:
    """Compile an update under `across` of the kernels of a network like Llama 70B, in bfloat16."""
    sizes = {"q": 8192, "k": 1024, "v": 1024, "o": 8192, "gate": 28672, "up": 28672}
    shapes = {name: (80, 8192, size) for name, size in sizes.items()} | {"down": (80, 28672, 8192)}
    params = {name: cut(shape, jnp.bfloat16, mesh) for name, shape in shapes.items()}
    tx = wrappers()["across"]

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    figures = compiled(step, params, started(tx, params), params).figures
    return {
        "weights": sum(leaf.size for leaf in params.values()),
        **figures,
        "temporary_shards": figures["temporary_bytes"] / shard_bytes(params),
    }


def attempt(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Give what ``make`` gives, or the first line of why it does not."""
    try:
        result = make()
    except Exception as error:  # the other parts are worth having
        result = {"error": first_line(error)}
    print(f"{name}: {result.get('error') or in_words(result)}", flush=True)
    return result


def in_words(result: dict[str, Any]) -> str:
    """The numbers of a part, in a line."""
    return ", ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in result.items())


def show(dtype: str, topology: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one dtype."""
    weights = 2 * LAYERS * WIDTH * HIDDEN / 1e9
    print_table(
        f"{weights:.1f} billion {dtype} weights on {topology}, over the bare step of Adam",
        COLUMNS,
        [
            [
                row["row"],
                f"{row['temporary_above_bare']:+.3f}",
                f"{row['bytes_over_bare']:.3f}",
                f"{row['bytes_between_over_bare']:.3f}" + "*" * (row["searches_left_between"] > 0),
                "?" if row["cycles_over_bare"] is None else f"{row['cycles_over_bare']:.3f}",
                f"{row['aliased']} of {row['donated']}",
                f"{row['collectives_added']}, {row['largest_added']} B",
                f"{row['wall_seconds']:.1f}",
                f"{row['cpu_seconds']:.1f}",
            ]
            for row in rows
            if "error" not in row  # it was printed
        ],
    )


def main(config: Config) -> dict[str, Any]:
    os.environ.update(ENVIRONMENT)  # before the first array, with which jax looks for devices
    jax.config.update("jax_platforms", "cpu")  # where the few arrays are that are not described
    wrong = sorted(set(config.rows) - {*wrappers(), *PARTS})
    if wrong:
        raise ValueError(f"There are no rows {wrong}. Choose from {[*wrappers(), *PARTS]}.")
    compiler = {"jax": jax.__version__, "libtpu": libtpu_version()}
    result: dict[str, Any] = {"machine": machine(), **compiler, "topology": config.topology}
    try:
        mesh = topology_mesh(config.topology)
    except RuntimeError as error:
        print(error)
        result["error"] = str(error)
    else:
        print("Compiled by", *(f"{name} {version}" for name, version in compiler.items()))
        result |= compile_all(config, mesh)
    write_json(config.out, result)
    return result


def compile_all(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Compile and show the rows of the table, then the parts beside it."""
    rows = list(table(config, mesh))
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        show(dtype, config.topology, [row for row in rows if row["dtype"] == dtype])
    if rows:
        print(LEGEND)
    make = {"unrolled": lambda: many_leaves(mesh), "llama": lambda: llama(topology_mesh(LARGE))}
    parts = [name for name in PARTS if not config.rows or name in config.rows]
    return {"rows": rows} | {name: attempt(name, make[name]) for name in parts}


if __name__ == "__main__":
    main(tyro.cli(Config))
