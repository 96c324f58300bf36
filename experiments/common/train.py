"""The one training loop: a step, scanned in one program or taken one by one; seeds side by side."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxprune as jp
from experiments.common.data import Examples

Variables = dict[str, Any]  # `params`, and statistics such as those of batch normalisation
Learn = Callable[[Variables, Any], tuple[jax.Array, Variables]]  # logits, statistics that moved
Infer = Callable[[Variables, Any], jax.Array]  # logits
Loss = Callable[[jax.Array, Any], jax.Array]  # of logits and targets; the mean over a batch
Compile = Callable[..., Callable[..., Any]]  # a function for the shapes of its arguments
AT_ONCE = 1000  # examples that are tested together
ALL, EACH = PartitionSpec(), PartitionSpec("seeds")


def losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss of each class that was to be found, of logits `[..., classes]`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean loss of classes."""
    return losses(logits, targets).mean()


class Recipe(NamedTuple):
    """What a step of training needs to know.

    Attributes:
      learn: the network as in training.
      tx: optimizer.
      loss: of logits and targets; the mean over a batch.
      shown: what the network is given, where that is not what the optimizer keeps; from params and
        the optimizer's state.
    """

    learn: Learn
    tx: optax.GradientTransformation
    loss: Loss = cross_entropy
    shown: Callable[[Any, Any], Any] = lambda params, state: params


def learner(model: nn.Module) -> Learn:
    """Make what trains a network without statistics."""
    return lambda variables, inputs: (model.apply(variables, inputs), {})


@functools.partial(jax.jit, static_argnames=("examples", "steps", "batch_size"))
def batch_order(key: jax.Array, *, examples: int, steps: int, batch_size: int) -> jax.Array:
    """Choose the examples of every batch: one permutation of them all after another.

    Returns:
      Indices `[steps, batch_size]`. A longer order begins with the shorter one.
    """
    epochs = -(-steps * batch_size // examples)
    keys = jax.vmap(lambda epoch: jax.random.fold_in(key, epoch))(jnp.arange(epochs))
    order = jax.vmap(lambda key: jax.random.permutation(key, examples))(keys)
    return order.reshape(-1)[: steps * batch_size].reshape(steps, batch_size)


def gradient(
    learn: Learn, variables: Variables, batch: Examples, *, loss: Loss = cross_entropy
) -> tuple[Any, Variables]:
    """Differentiate the loss of a batch; gives that of the params, and statistics that moved."""

    def of_params(params: Any) -> tuple[jax.Array, Variables]:
        logits, moved = learn({**variables, "params": params}, batch.inputs)
        return loss(logits, batch.targets), moved

    return jax.grad(of_params, has_aux=True)(variables["params"])


def step(
    recipe: Recipe, variables: Variables, state: Any, batch: Examples
) -> tuple[Variables, Any]:
    """Take a step: from variables and the optimizer's state to those after a batch."""
    learn, tx, loss, shown = recipe
    seen = {**variables, "params": shown(variables["params"], state)}
    grads, moved = gradient(learn, seen, batch, loss=loss)
    updates, state = tx.update(grads, state, variables["params"])
    params = optax.apply_updates(variables["params"], updates)
    return {**variables, **moved, "params": params}, state


def scan(
    recipe: Recipe,
    variables: Variables,
    state: Any,
    examples: Examples,
    order: jax.Array,
    *,
    look: Callable[[Any], Any] = lambda state: None,
) -> tuple[Variables, Any, Any]:
    """Take a step for each batch, inside of one program.

    Args:
      recipe: of a step.
      variables: where to start from.
      state: of the optimizer.
      examples: what to fit.
      order: which of them are in each batch, `[steps, batch size]`.
      look: what to collect from the optimizer's state before each step.

    Returns:
      Variables and state after the last step, and what ``look`` gave, `[steps, ...]`.
    """

    def body(carry: tuple[Variables, Any], indices: jax.Array) -> tuple[tuple[Variables, Any], Any]:
        variables, state = carry
        batch = jax.tree.map(lambda array: array[indices], examples)
        return step(recipe, variables, state, batch), look(state)

    (variables, state), seen = jax.lax.scan(body, (variables, state), order)
    return variables, state, seen


def loop(
    recipe: Callable[[jax.Array], Recipe],
    variables: Variables,
    state: Any,
    batches: Iterable[tuple[Examples, np.ndarray]],
    compile_: Compile,
) -> tuple[Variables, Any]:
    """Take a step for each batch and learning rate, in a loop of Python over one program.

    For networks whose size changes on the way, and for convolutions: one in a loop of XLA is slow
    on a CPU.

    Args:
      recipe: of a step at a learning rate, which is traced.
      variables: where to start from.
      state: of the optimizer.
      batches: of one size, and their learning rates.
      compile_: what :func:`compiler` made.
    """

    def one(variables: Variables, state: Any, batch: Examples, rate: jax.Array) -> Any:
        return step(recipe(rate), variables, state, batch)

    take = None
    for batch, rate in batches:
        take = take or compile_(one, variables, state, batch, rate)
        variables, state = take(variables, state, batch, rate)
    return variables, state


def compiler() -> Compile:
    """Make a jit that compiles programs which read the same only once.

    For jax the small networks of two seeds or methods are different functions even where their
    widths agree, and to compile one takes as long as hundreds of its steps.
    """
    programs: dict[Any, Any] = {}

    def compile_(fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
        # What is not used has to show too: layers that are left out are told apart by nothing else.
        lowered = jax.jit(fn, keep_unused=True).lower(*args)
        key = lowered.as_text(), lowered.in_tree, lowered.out_tree
        if key not in programs:
            programs[key] = lowered.compile()
        return programs[key]

    return compile_


def learning_rates(highest: float, steps: int) -> np.ndarray:
    """Rise over the first tenth of the steps, and fall to 0 as a cosine; float32 `[steps]`."""
    progress = (np.arange(steps) + 0.5) / steps
    rates = highest * np.minimum(1, 10 * progress) * (1 + np.cos(np.pi * progress)) / 2
    return rates.astype(np.float32)


def clipped_adam(rate: Any, *, held: bool = False) -> optax.GradientTransformationExtraArgs:
    """Adam on clipped gradients, whose learning rate may be traced; if ``held``, under masks."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    return jp.hold(tx) if held else tx


def mean_gradient(
    learn: Learn, variables: Variables, batches: Iterable[Examples], compile_: Compile
) -> Any:
    """Average the gradient of the loss over batches of one size."""
    take, grads = None, []
    for batch in batches:
        take = take or compile_(functools.partial(gradient, learn), variables, batch)
        grads.append(take(variables, batch)[0])
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *grads)


def predict(
    infer: Infer, variables: Variables, inputs: np.ndarray, compile_: Compile
) -> np.ndarray:
    """Give the logits of all inputs, `[n, ..., classes]`."""
    parts = np.array_split(inputs, -(-len(inputs) // AT_ONCE))
    # Parts of one size, and maybe some that are smaller by one.
    asks = {len(part): compile_(infer, variables, part) for part in (parts[0], parts[-1])}
    return np.concatenate([asks[len(part)](variables, part) for part in parts])


def evaluate(
    infer: Infer, variables: Variables, test: Examples, compile_: Compile
) -> dict[str, float]:
    """Tell the share of targets that are the most likely class, from a count, and the mean loss."""

    def ask(variables: Variables, batch: Examples) -> tuple[jax.Array, jax.Array]:
        logits = infer(variables, batch.inputs)
        hits = (logits.argmax(-1) == batch.targets).sum()
        return hits, losses(logits, batch.targets).sum()

    parts = -(-len(test.targets) // AT_ONCE)
    batches = list(map(Examples, *(np.array_split(array, parts) for array in test)))
    asks = {len(b.targets): compile_(ask, variables, b) for b in (batches[0], batches[-1])}
    answers = [asks[len(b.targets)](variables, b) for b in batches]
    hits, total = (sum(map(float, each)) for each in zip(*answers, strict=True))
    return {"accuracy": hits / test.targets.size, "loss": total / test.targets.size}


def accuracy(params: Any, *, test: Examples, model: nn.Module) -> float:
    """Fraction of the examples that the network gets right, from an exact count."""
    return int(_hits(params, test, model=model)) / len(test.targets)


@functools.partial(jax.jit, static_argnames="model")
def _hits(params: Any, test: Examples, *, model: nn.Module) -> jax.Array:
    return (model.apply({"params": params}, test.inputs).argmax(-1) == test.targets).sum()


def each_seed(
    run: Callable[..., Any], starts: Sequence[Any], *common: Any, together: bool, **static: Any
) -> Iterator[Any]:
    """Train seeds in one program, or one after another; what comes back lies in NumPy.

    Args:
      run: from what belongs to one seed, and what is common to all, to arrays.
      starts: what belongs to each seed.
      common: handed to every seed as it is.
      together: whether in one program.
      static: settings that the program is compiled for.
    """
    settings = tuple(static.items())
    if together:
        yield from unstack(_together(run, settings, stack(starts), *common))
    else:
        for start in starts:
            yield jax.device_get(_alone(run, settings, start, *common))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _alone(run: Callable[..., Any], settings: Any, start: Any, *common: Any) -> Any:
    return run(start, *common, **dict(settings))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _together(run: Callable[..., Any], settings: Any, stacked: Any, *common: Any) -> Any:
    return side_by_side(functools.partial(run, **dict(settings)), stacked, *common)


def side_by_side(run: Callable[..., Any], stacked: Any, *common: Any) -> Any:
    """Run a function for every seed in one program; ``stacked`` and the result are `[seeds, ...]`.

    Each device maps over the seeds that it has, and knows nothing of the others: a loop inside
    ends when its own seeds have. How XLA rounds may depend on how many seeds a device has; alone
    on its device a seed is not mapped over, and has the numbers that it has alone.
    """
    seeds = mesh(count := len(jax.tree.leaves(stacked)[0]))

    def mapped(stacked: Any, *common: Any) -> Any:
        if count > seeds.size:
            return jax.vmap(run, in_axes=(0, *(None for _ in common)))(stacked, *common)
        alone = run(jax.tree.map(lambda leaf: leaf[0], stacked), *common)
        return jax.tree.map(lambda leaf: leaf[None], alone)

    return jax.shard_map(
        mapped,
        mesh=seeds,
        in_specs=(EACH, *(ALL for _ in common)),
        out_specs=EACH,
        check_vma=False,  # nothing goes from one seed to another
    )(stacked, *common)


def mesh(count: int) -> Mesh:
    """Line up devices of this process for ``count`` seeds: as many as divide them evenly.

    Eight seeds use eight devices of eight, five use five, nine use three; no device idles while
    another has more than its share.
    """
    devices = jax.local_devices()
    used = max(n for n in range(1, len(devices) + 1) if count % n == 0)
    return Mesh(np.array(devices[:used]), ("seeds",), axis_types=(AxisType.Auto,))


def placed(tree: Any, seeds: int, *, together: bool) -> Any:
    """Put arrays on the device once and for all, or on every device that the seeds share."""
    return jax.device_put(tree, NamedSharding(mesh(seeds), ALL) if together else None)


def stack(trees: Sequence[Any]) -> Any:
    """Stack trees of arrays along a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any) -> list[Any]:
    """Fetch a stacked tree from the devices, and take it apart along its first axis."""
    leaves, structure = jax.tree.flatten(jax.device_get(tree))
    return [jax.tree.unflatten(structure, each) for each in zip(*leaves, strict=True)]
