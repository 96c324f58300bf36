"""Tests of runs on disk: they go on bit for bit, without a retrace, and survive a kill."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune as jp
from jaxprune.checkpoint import _step, latest_step, restore_run, save_run
from tests.helpers import TraceCount, with_old_bits

pytest.importorskip("orbax.checkpoint")

TX = jp.prune(optax.adam(0.1), schedule=jp.schedules.cubic(0.8, begin=0, end=6, every=2))
PARAMS = {
    "kernel": jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32),
    "bias": jnp.zeros(8),
}


def fresh(tx=TX, params=PARAMS):
    """A run before its first step, on buffers of its own: steps donate them."""
    state = {"params": params, "opt_state": tx.init(params), "key": jax.random.key(1)}
    return {**jax.tree.map(jnp.copy, state), "step": 0}


def train(tx=TX):
    """A jitted step with noise from a key, and the count of its traces."""

    def step(state):
        noise = jax.random.normal(jax.random.fold_in(state["key"], state["step"]), (16, 8))
        grads = {"kernel": state["params"]["kernel"] + noise, "bias": state["params"]["bias"] + 1}
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        rest = {"key": state["key"], "step": state["step"] + 1}
        return {"params": params, "opt_state": opt_state, **rest}

    traces = TraceCount(step)
    return jax.jit(traces, donate_argnums=0), traces


def run(step, state, n):
    for _ in range(n):
        state = step(state)
    return state


def plain(tree):
    """Bits of all leaves, keys as words."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    tree = jax.tree.map(jnp.asarray, tree)
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(plain(got)), jax.tree.leaves(plain(want)), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_restored_run_goes_on_bit_for_bit_and_without_a_retrace(tmp_path, packed):
    schedule = jp.schedules.cubic(0.8, begin=0, end=6, every=2)
    tx = jp.prune(optax.adam(0.1), schedule=schedule, packed=packed)
    step, traces = train(tx)
    state = run(step, fresh(tx), 3)
    save_run(tmp_path, 3, state)
    undisturbed = plain(run(step, state, 4))
    compiled = step._cache_size()
    for like in (fresh(tx), jax.eval_shape(lambda: fresh(tx)), run(step, fresh(tx), 1)):
        restored = restore_run(tmp_path, like)
        assert type(restored["step"]) is (int if type(like["step"]) is int else type(jnp.ones(1)))
        assert_same_bits(run(step, restored, 4), undisturbed)
    assert traces.count == 1 and step._cache_size() == compiled


@pytest.mark.parametrize("saved, wanted", [(False, True), (True, False), (True, True)])
def test_masks_come_back_packed_or_not_as_like_has_them(tmp_path, saved, wanted):
    make = lambda packed: jp.hold(optax.chain(optax.clip(1.0), optax.adam(0.1)), packed=packed)
    masks = {"kernel": jnp.asarray(np.random.default_rng(1).random((16, 8)) < 0.5), "bias": None}
    states = {
        packed: jp.with_masks(optax.MultiSteps(make(packed), 2).init(PARAMS), masks)
        for packed in (False, True)
    }
    save_run(tmp_path, 0, states[saved])
    empty = optax.MultiSteps(make(wanted), 2).init(PARAMS)
    assert_same_bits(restore_run(tmp_path, empty), states[wanted])


def test_bits_of_an_earlier_version_come_back_in_those_of_today(tmp_path):
    masks = {"kernel": jnp.asarray(np.random.default_rng(1).random((16, 8)) < 0.5), "bias": None}
    tx = jp.hold(optax.adam(0.1), packed=True)
    state = jp.with_masks(tx.init(PARAMS), masks)
    old = with_old_bits(state)
    save_run(tmp_path / "run", 0, state)
    save_run(tmp_path / "old", 0, old)  # in memory they may lie in either way, on disk in one
    for folder, like in product(("run", "old"), (tx.init(PARAMS), with_old_bits(old))):
        want = state if like.masks["kernel"].bits.shape == (2, 8) else old
        assert_same_bits(restore_run(tmp_path / folder, like), want)


def test_orbax_alone_says_that_bits_have_another_shape_than_those_it_wrote(tmp_path):
    import orbax.checkpoint as ocp

    masks = {"kernel": jnp.asarray(np.random.default_rng(1).random((16, 8)) < 0.5), "bias": None}
    tx = jp.hold(optax.adam(0.1), packed=True)
    state, start = jp.with_masks(tx.init(PARAMS), masks), tx.init(PARAMS)
    with ocp.StandardCheckpointer() as orbax:
        orbax.save(tmp_path / "old", with_old_bits(state))
        orbax.wait_until_finished()
        with pytest.raises(ValueError, match=r"\(2, 8\) is not compatible with the stored shape"):
            orbax.restore(tmp_path / "old", start)
        back = orbax.restore(tmp_path / "old", with_old_bits(start))
    assert_same_bits(jp.with_masks(back, jp.get_masks(back)), state)


def test_masks_are_bits_on_disk_wherever_they_are(tmp_path):
    mask = jnp.asarray(np.random.default_rng(1).random((512, 512)) < 0.5)
    level = jp.Level(2, {"kernel": mask, "bias": None}, {}, {})
    save_run(tmp_path, 0, {"level": level, "stack": jnp.stack([mask, ~mask])})
    size = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert 3 * mask.size / 8 < size < 3 * mask.size / 8 + 20_000
    like = {
        "level": jp.Level(0, {"kernel": ~mask, "bias": None}, {}, {}),
        "stack": jnp.ones((2, 512, 512), bool),
    }
    got = restore_run(tmp_path, like)
    assert got["level"].index == 2 and got["level"].masks["bias"] is None
    np.testing.assert_array_equal(got["stack"], jnp.stack([mask, ~mask]))
    np.testing.assert_array_equal(got["level"].masks["kernel"], mask)


def test_a_stack_of_packed_masks_comes_back(tmp_path):
    for name, shape in {"scalars": (), "vectors": (9,), "matrices": (3, 5)}.items():
        masks = {"w": jnp.asarray(np.random.default_rng(0).random((4, *shape)) < 0.5)}
        packed = jax.vmap(jp.pack)(masks)
        save_run(tmp_path / name, 0, packed)
        assert_same_bits(restore_run(tmp_path / name, packed), packed)
        assert_same_bits(restore_run(tmp_path / name, masks), masks)


LEAVES = {
    "numbers": {"i": 7, "f": 0.1, "b": True, "c": 1j, "long": 2**40},
    "numpy": {"a": np.arange(3.0), "s": np.float32(2.5), "t": np.arange(6, dtype=">i4")[::2]},
    "narrow": {
        d: jnp.asarray([1, 0, 1], d) for d in ("bfloat16", "float8_e4m3fn", "int4", "uint4")
    },
    "bits of no value": {"w": np.array([0x7FC01234, 0x80000000], np.uint32).view(np.float32)},
    "empty": {"a": jnp.zeros((0, 3)), "b": jnp.zeros((2, 0), bool), "c": jnp.ones(1)},
    "scalars": {"weak": jnp.asarray(2.5), "strong": jnp.float32(2.5), "bool": jnp.bool_(True)},
    "keys": {"one": jax.random.key(3), "many": jax.random.split(jax.random.key(4, impl="rbg"), 3)},
    "odd names": {
        "a/~/b": {"": jnp.ones(1)},
        "a.b": jnp.ones(2),
        "ü x": jnp.ones(3),
        "..": jnp.ones(4),
    },
    "holes": {"a": None, "m": optax.MaskedNode(), "w": jnp.ones(2)},
    "one array": jnp.arange(3.0),
}


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_of_every_sort_come_back_as_they_are_in_like(tmp_path, name):
    state = LEAVES[name]
    save_run(tmp_path, 1, state)
    got = restore_run(tmp_path, state)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True):
        assert type(a) is type(b)
        if isinstance(b, bool | int | float | complex):
            assert a == b
        else:
            assert a.dtype == b.dtype and getattr(a, "weak_type", 0) == getattr(b, "weak_type", 0)
            assert_same_bits([a], [b]) if isinstance(
                a, jax.Array
            ) else np.testing.assert_array_equal(a, b)


def test_linen_train_states_come_back(tmp_path):
    tx = jp.hold(optax.sgd(0.1, momentum=0.9))
    state = TrainState.create(apply_fn=jnp.tanh, params=PARAMS, tx=tx)
    trained = state.apply_gradients(grads=PARAMS)
    save_run(tmp_path, 2, trained)
    restored = restore_run(tmp_path, state)
    assert restored.step == 1 and restored.apply_fn == jnp.tanh and restored.tx == tx
    assert_same_bits((restored.params, restored.opt_state), (trained.params, trained.opt_state))


def test_nnx_states_come_back(tmp_path):
    def build(seed):
        rngs = nnx.Rngs(seed)
        module = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
        return module, nnx.Optimizer(module, jp.hold(optax.sgd(0.1)), wrt=nnx.Param)

    state = nnx.state(build(0))
    save_run(tmp_path, 1, state)
    built = build(1)
    nnx.update(built, restore_run(tmp_path, nnx.state(built)))
    assert_same_bits(nnx.state(built), state)


def spread(state, devices):
    """Rows of the params and of what mirrors them on different devices, all else on all."""
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))

    def put(x):
        spec = PartitionSpec("x") if jnp.ndim(x) == 2 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, state)


@pytest.mark.parametrize("saved, wanted", [(8, 1), (1, 8), (8, 4)])
def test_a_run_goes_on_with_another_number_of_devices(tmp_path, saved, wanted):
    state = {**fresh(), "step": 3}
    masks = {"kernel": jnp.asarray(np.random.default_rng(1).random((16, 8)) < 0.5), "bias": None}
    state["opt_state"] = jp.with_masks(state["opt_state"], masks)
    many = state if saved == 1 else spread(state, saved)
    save_run(tmp_path, 3, many)
    like = fresh() if wanted == 1 else spread(fresh(), wanted)
    got = restore_run(tmp_path, like)
    assert_same_bits(got, state)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(like), strict=True):
        if isinstance(b, jax.Array):
            assert a.sharding == b.sharding and a.committed == b.committed


def test_a_sharded_step_goes_on_without_a_retrace(tmp_path):
    step, traces = train()
    state = run(step, spread(fresh(), 8), 4)  # by then nothing new is to be seen for jit
    count, compiled = traces.count, step._cache_size()
    save_run(tmp_path, 2, state)
    restored = restore_run(tmp_path, state)
    assert_same_bits(step(restored), step(state))
    assert traces.count == count and step._cache_size() == compiled


def test_the_latest_steps_stay_and_any_of_them_comes_back(tmp_path):
    assert latest_step(tmp_path) is None and latest_step(tmp_path / "nowhere") is None
    for step in (0, 5, 7, 12):
        save_run(tmp_path, step, {"w": jnp.full(2, step)}, keep=2)
    assert latest_step(tmp_path) == 12
    like = {"w": jnp.zeros(2, int)}
    assert restore_run(tmp_path, like)["w"][0] == 12
    assert restore_run(tmp_path, like, step=7)["w"][0] == 7
    with pytest.raises(ValueError, match=r"got step=5, but .* holds \[7, 12\]"):
        restore_run(tmp_path, like, step=5)


def test_a_step_that_is_there_or_was_passed_is_refused(tmp_path):
    state = {"w": jnp.ones(2)}
    save_run(tmp_path, 5, state)
    for step in (5, 3):
        with pytest.raises(ValueError, match=rf"got step={step}, but .* holds step 5 already"):
            save_run(tmp_path, step, state)
    for step, keep in ((-1, 1), (1.0, 1), (True, 1), (6, 0)):
        with pytest.raises(ValueError, match="Steps are integers from 0 on"):
            save_run(tmp_path, step, state, keep=keep)
    assert latest_step(tmp_path) == 5


def test_a_folder_without_a_complete_step_is_said_to_be_one(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="holds no complete step of a run"):
            restore_run(folder, {"w": jnp.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_another_config_is_refused_by_field(tmp_path):
    state, config = (
        {"w": jnp.ones(2)},
        {"lr": 0.1, "model": {"width": 8, "depth": 2}, "seeds": (1, 2)},
    )
    save_run(tmp_path, 1, state, config=config)
    restore_run(tmp_path, state, config=config)
    restore_run(tmp_path, state)
    other = {"lr": 0.2, "model": {"width": 8, "depth": 3}, "seeds": (1, 2), "new": None}
    fields = r"lr \(0.1 there, 0.2 here\), model.depth \(2 there, 3 here\)"
    message = rf"holds a run of another config: {fields}\. Go on with the same"
    with pytest.raises(ValueError, match=message):
        restore_run(tmp_path, state, config=other)
    with pytest.raises(ValueError, match=message):
        save_run(tmp_path, 2, state, config=other)
    assert latest_step(tmp_path) == 1
    with pytest.raises(
        TypeError, match=r"what JSON does not know: 'f' is .*, 'x' is nan. Use strings"
    ):
        save_run(tmp_path, 2, state, config={"a": 1, "f": jnp.sum, "x": float("nan")})


def test_a_state_of_another_model_is_refused_path_by_path(tmp_path):
    save_run(tmp_path, 3, fresh())
    other = {"kernel": jnp.ones((16, 4)), "scale": jnp.ones(4)}
    like = {**fresh(TX, other), "step": 0.5}
    with pytest.raises(ValueError) as error:
        restore_run(tmp_path, like)
    text = str(error.value)
    for line in (
        "'params/kernel' is float32[16, 8] there and float32[16, 4] in `like`",
        "'params/bias' is float32[8] there and nothing in `like`",
        "'params/scale' is nothing there and float32[4] in `like`",
        "'opt_state/masks/kernel' is bool[16, 8] there and bool[16, 4] in `like`",
        "'opt_state/inner_state/0/mu/kernel' is float32[16, 8] there and float32[16, 4] in `like`",
        "'step' is int[] there and float[] in `like`",
        "Build `like` as the run that was saved did.",
    ):
        assert line in text


def test_a_mesh_that_does_not_divide_a_leaf_is_refused_with_its_path(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tall = {"kernel": jnp.ones((12, 8)), "bias": jnp.ones(8)}
    save_run(tmp_path, 1, tall)
    jp.checkpoint.save(tmp_path / "model.safetensors", tall, {"kernel": None, "bias": None})
    cut = NamedSharding(mesh, PartitionSpec("data"))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut), tall)
    message = (
        r"cut into parts that are not equal: 'kernel' of shape \(12, 8\) by .*data=8\)\. Choose"
    )
    with pytest.raises(ValueError, match=message):
        restore_run(tmp_path, like)
    with pytest.raises(ValueError, match=message):
        jp.checkpoint.load(tmp_path / "model.safetensors", like=like)


def test_what_cannot_be_saved_is_refused_with_its_path(tmp_path):
    with pytest.raises(TypeError, match=r"save_run\(state\)` got .*'name' is of type object"):
        save_run(tmp_path, 1, {"name": object(), "w": jnp.ones(2)})
    with pytest.raises(ValueError, match="several leaves at 'a/b'"):
        save_run(tmp_path, 1, {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}})
    with pytest.raises(ValueError, match="a state without arrays"):
        save_run(tmp_path, 1, {"a": None, "b": jnp.ones(0)})
    assert latest_step(tmp_path) is None


def test_steps_are_integers_of_any_make_and_functions_stay_in_the_code(tmp_path):
    state = {"f": jax.nn.relu, "name": "lenet", "w": jnp.ones(2)}
    for step in (jnp.int32(3), np.int64(4), np.array(5)):
        save_run(tmp_path, step, state)
    assert latest_step(tmp_path) == 5
    got = restore_run(tmp_path, {**state, "name": "another"}, step=jnp.int32(4))
    assert got["f"] is jax.nn.relu and got["name"] == "another"
    for step in (1.0, True, jnp.float32(1), jnp.ones(1, jnp.int32)):
        with pytest.raises(ValueError, match="Steps are integers from 0 on"):
            save_run(tmp_path, step, state)


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("x")
    for bad in ("file", "file/run"):
        with pytest.raises(
            OSError, match=rf"`save_run` cannot write step 1 to .*{bad}.*choose a folder"
        ):
            save_run(tmp_path / bad, 1, {"w": jnp.ones(2)})


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    state = {"w": jnp.ones(2)}
    seal = _step._seal
    monkeypatch.setattr(_step, "_seal", lambda manifest: seal(manifest, 2))
    save_run(tmp_path, 1, state)
    monkeypatch.undo()
    message = r"written by a newer jaxprune \(format 2, this one reads 1\): upgrade"
    with pytest.raises(ValueError, match=message):
        restore_run(tmp_path, state)


def test_a_checkpoint_of_somebody_else_is_refused(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave({"w": jnp.ones(2)}))
    with pytest.raises(ValueError, match=r"Step 3 in .* has no manifest of jaxprune"):
        restore_run(tmp_path, {"w": jnp.ones(2)})


def damage(file, kind, place):
    whole = bytearray(file.read_bytes())
    if kind == "cut":
        file.write_bytes(whole[:place])
    else:
        whole[place] ^= 1 << place % 8
        file.write_bytes(whole)


# Orbax 0.12 closes its event loop before it has cleaned up behind what failed in it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["cut", "flip"])
def test_a_damaged_step_is_refused_or_comes_back_whole(tmp_path, kind):
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=300)), "step": 3}
    save_run(tmp_path / "whole", 2, state)
    save_run(tmp_path / "whole", 3, state)
    step = Path("whole", "3")
    files = sorted(p.relative_to(tmp_path) for p in (tmp_path / step).rglob("*") if p.is_file())
    refused = 0
    for number, file in enumerate(files):
        shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        victim = tmp_path / str(number) / file.relative_to("whole")
        damage(victim, kind, victim.stat().st_size // 2)
        try:
            assert_same_bits(restore_run(tmp_path / str(number), state), state)
        except ValueError as error:
            assert "is damaged" in str(error) and r"Restore another step: [2]" in str(error)
            refused += 1
        assert_same_bits(restore_run(tmp_path / str(number), state, step=2), state)
    assert refused >= 3  # the manifest, the arrays and what orbax needs to find them


def test_arrays_that_changed_on_disk_are_named_by_path(tmp_path, monkeypatch):
    state = {"w": jnp.arange(3.0), "mask": jnp.array([True, False]), "v": jnp.ones(2)}
    save_run(tmp_path, 1, state)
    read = _step._read_arrays
    monkeypatch.setattr(
        _step,
        "_read_arrays",
        lambda *a: {**read(*a), "w": np.zeros(3, np.float32), "mask": np.uint8([0])},
    )
    with pytest.raises(
        ValueError, match=r"Step 1 .* is damaged: 'mask', 'w' do not match their checksum"
    ):
        restore_run(tmp_path, state)


SAVER = """
import sys
import numpy as np
import jaxprune as jp
folder, start = sys.argv[1], int(sys.argv[2])
for step in range(start, 1000):
    w = np.full((400, 400), step, np.float32)
    jp.checkpoint.save_run(folder, step, {"w": w, "mask": w % 2 == 0, "step": step}, keep=2)
    print(step, flush=True)
"""


def kill_in_the_middle(folder, kills, seed):
    """Kill a process that saves, again and again; its last complete step has to come back."""
    like = {"w": np.zeros((400, 400), np.float32), "mask": np.zeros((400, 400), bool), "step": 0}
    rng, seen = np.random.default_rng(seed), []
    for _ in range(kills):
        last = latest_step(folder)
        command = [sys.executable, "-c", SAVER, str(folder), str(0 if last is None else last + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as saver:
            said = int(saver.stdout.readline())
            time.sleep(rng.uniform(0, 0.3))
            saver.send_signal(signal.SIGKILL)
            said = max([said, *(int(line) for line in saver.stdout if line.endswith("\n"))])
        state = restore_run(folder, like)
        assert state["step"] == latest_step(folder) >= said
        assert (state["w"] == state["step"]).all() and (
            state["mask"] == (state["step"] % 2 == 0)
        ).all()
        seen.append(state["step"])
    assert seen == sorted(set(seen))
    return seen


def test_a_run_that_is_killed_while_it_saves_keeps_its_latest_complete_step(tmp_path):
    kill_in_the_middle(tmp_path, 2, seed=0)


@pytest.mark.slow
def test_a_run_that_is_killed_a_dozen_times_keeps_its_latest_complete_step(tmp_path):
    kill_in_the_middle(tmp_path, 12, seed=1)
    leftovers = [p.name for p in tmp_path.iterdir() if not p.name.isdigit()]
    assert len(leftovers) <= 1  # of the last kill; a save clears those of the kills before


OF_TWO = """
import sys
import jax
import numpy as np
folder, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, rank)
import jaxprune as jp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((16,), ("x",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("x"))
put = lambda a: jax.make_array_from_callback(a.shape, rows, lambda index: a[index])
w = np.arange(64, dtype=np.float32).reshape(16, 4)
mask = w % 3 == 0
w = w * mask

def holds(got, want):
    return got.sharding == rows and all(
        np.array_equal(shard.data, want[shard.index]) for shard in got.addressable_shards
    )

state = {"w": put(w), "mask": put(mask), "step": 3}
jp.checkpoint.save_run(f"{folder}/run", 1, state)
got = jp.checkpoint.restore_run(f"{folder}/run", {"w": put(-w), "mask": put(~mask), "step": 0})
assert holds(got["w"], w) and holds(got["mask"], mask) and got["step"] == 3
jp.checkpoint.save(f"{folder}/model", [state["w"]], [state["mask"]])
params, masks = jp.checkpoint.load(f"{folder}/model", [state["w"]])
assert holds(params[0], w) and holds(masks[0], mask)
print("done")
"""


@pytest.mark.slow
def test_runs_and_models_of_several_processes_are_saved_from_where_they_are(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", OF_TWO, str(tmp_path), port]
    pair = [subprocess.Popen([*command, rank], stdout=subprocess.PIPE, text=True) for rank in "01"]
    assert ["done" in process.communicate(timeout=120)[0] for process in pair] == [True, True]
    assert (
        restore_run(
            tmp_path / "run", {"w": jnp.ones((16, 4)), "mask": jnp.ones((16, 4), bool), "step": 0}
        )["step"]
        == 3
    )


def test_a_manifest_says_what_there_is_in_plain_json(tmp_path):
    save_run(tmp_path, 1, fresh(), config={"lr": 0.1})
    sealed = json.loads((tmp_path / "1" / "manifest" / "metadata").read_text())
    assert sealed["format"] == 1 and sealed["manifest"]["config"] == {"lr": 0.1}
    record = sealed["manifest"]["leaves"]["opt_state/masks/kernel"]
    assert record["dtype"] == "bool" and record["shape"] == [16, 8] and len(record["sha256"]) == 64
