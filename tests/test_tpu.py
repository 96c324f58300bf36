"""What the TPU compiler says of a pruned step, and how its programs are read."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tyro")
pytest.importorskip("rich")

from benchmarks import hlo, tpu, tpu_blocks

ROOT = Path(__file__).parents[1]
DTYPES = ("bfloat16", "float32")
# Temporary memory above the bare step, in shards of the params: bfloat16, float32. The larger of
# two compilers: jax 0.10.2 with libtpu 0.0.42.1, and 0.12.0.1 with 0.0.52.
MEMORY = {
    "hold": (0.0, 0.0),
    "prune": (0.003, 0.0),
    "across": (0.003, 0.0),
    "windows": (0.003, 0.0),
    "channels": (0.0, 0.001),
    "packed": (0.032, 0.016),
    "taylor": (0.001, 0.0),
    "fisher": (0.001, 0.0),
    "straight_through": (1.209, 0.266),
    "rigl": (1.253, 0.418),
    "set": (1.253, 0.418),
}
# Bytes between events, over those of the bare step: in bfloat16, where masks weigh most.
BETWEEN = dict.fromkeys(MEMORY, 1.044) | {"straight_through": 1.222, "rigl": 1.088, "set": 1.088}
# What a chip hands in to the largest collective that pruning adds: counts, and scores of channels.
LARGEST = dict.fromkeys(MEMORY, 64) | {"channels": 4 * (4096 + 16384)}
SLACK = 1.1
CASES = [(name, dtype) for name in MEMORY for dtype in DTYPES]

PROGRAM = """\
HloModule jit_step, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, may-alias) }, x={(1, {})}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %neg = f32[8]{0:T(128)} negate(%p), backend_config={"estimated_cycles":"1000"}
}

%layers (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %x = f32[8]{0:T(128)} get-tuple-element(%a), index=1
  %f = f32[8]{0:T(128)} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"7"}
}

%until_3 (a: (s32[], f32[8])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %a = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%a), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %three), direction=LT
}

%until_found (a: (s32[], f32[8])) -> pred[] {
  %a = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  ROOT %any = pred[]{:T(512)} fusion(%a), kind=kLoop, calls=%fused
}

ENTRY %main (q: f32[8]) -> f32[8] {
  %q = f32[8]{0:T(128)} parameter(0)
  %r = f32[8]{0:T(128)} fusion(%q), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"50"}
  %scan = (s32[], f32[8]{0:T(128)}) while(%q), condition=%until_3, body=%layers, metadata={op_name="jit(step)/jvp()/while"}
  %event = (s32[], f32[8]{0:T(128)}) while(%q), condition=%until_found, body=%layers, metadata={op_name="jit(step)/while"}
  ROOT %cond = f32[8]{0:T(128)} conditional(%q, %r, %r), branch_computations={%layers, %fused}
}
"""  # noqa: E501

COLLECTIVES = """\
ENTRY %main (q: bf16[2,8]) -> bf16[2,8] {
  %q = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  %n = s32[3]{0:T(128)} constant({1, 2, 3})
  %g.1 = bf16[16,8]{1,0} all-gather(%q), channel_id=1, dimensions={0}
  %g.2 = bf16[16,8]{1,0} all-gather(%q), channel_id=1, dimensions={0}
  %s = (s32[3]{0}, bf16[2,8]{1,0}) all-reduce-start(%n, %q), channel_id=1, to_apply=%add
  %d = (s32[3]{0}, bf16[2,8]{1,0}) all-reduce-done(%s)
  ROOT %c = bf16[2,8]{1,0} add(%q, %q)
}
"""


def test_cycles_count_a_scan_by_its_rounds_an_event_not_and_the_cheap_branch():
    assert hlo.cycles(hlo.parse(PROGRAM)) == 50 + 3 * 7 + 7
    assert hlo.searches(hlo.parse(PROGRAM)) == 2  # the event and the conditional


def test_cycles_are_not_told_where_a_loop_of_the_network_has_no_count():
    program = PROGRAM.replace("jit(step)/while", "jit(step)/transpose(jvp())/while")
    with pytest.raises(ValueError, match="loop of the network"):
        hlo.cycles(hlo.parse(program))


def test_collectives_count_one_that_is_written_twice_once_with_all_that_it_is_given():
    assert hlo.collectives(hlo.parse(COLLECTIVES)) == {
        ("all-gather", 32): 1,
        ("all-reduce", 12 + 32): 1,
    }


def test_aliased_counts_arguments_that_results_are_written_to():
    assert hlo.aliased(PROGRAM) == 2
    assert hlo.aliased("HloModule jit_step, entry_computation_layout={(f32[8])}") == 0


@pytest.mark.parametrize(
    ("type_", "size"),
    [
        ("pred[24,2]{1,0:T(32,128)(4,1)}", 48),
        ("(s32[], /*index=1*/bf16[3,5]{1,0:T(8,128)(2,1)S(1)})", 4 + 30),
        ("f8e4m3fn[7]{0}", 7),
        ("u4[8]{0}", 4),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_type_leave_its_layout_aside(type_, size):
    assert hlo.bytes_of(type_) == size


def test_bundles_of_a_schedule_are_counted_by_the_loops_around_them():
    schedule = """\
LB: loop body
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sadd.s32 1, %s1  ;;  %s3 = smov 2 }
   0x2   : > { %dma = dma.hbm_to_vmem
base_bounds: (32, 4) }
   0x3 LB: >> { %v1 = vld [vmem:[%s2] sm:$0xff] }
  0x1f PF: > {}
"""
    assert hlo.bundles(schedule) == {0: 1, 1: 3, 2: 1}


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("module @jit_step {}")


@pytest.mark.parametrize("error", [RuntimeError, ImportError, ValueError])
def test_without_a_compiler_there_is_one_line_and_no_error(error, monkeypatch, capsys, tmp_path):
    def refuse(name, *, platform):
        raise error("TPU support is not installed.\nA second line.")

    monkeypatch.setattr(tpu.topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(tpu.os, "environ", dict(os.environ))
    result = tpu.main(tpu.Config(out=tmp_path / "tpu.json"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line == result["error"] == json.loads((tmp_path / "tpu.json").read_text())["error"]
    assert "'v5e:2x4': " in line and "is not installed. " in line and "'.[tpu-aot]'" in line


def test_rows_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no rows \['prunes'\].*'prune'.*'llama'"):
        tpu.main(tpu.Config(rows=("prune", "prunes"), out=tmp_path / "tpu.json"))


def test_limits_are_set_for_every_row_of_the_table():
    assert {*MEMORY, "bare"} == tpu.wrappers().keys()


def said(module, out):
    """All that a benchmark says, from one process of it."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install -e '.[tpu-aot]'")
    # The settings of the tests would have programs compiled in a hurry, and kept.
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-m", module.__name__, "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env=env | {"XLA_FLAGS": ""}, check=True)
    result = json.loads(out.read_text())
    if "error" in result:
        pytest.skip(result["error"])
    return result


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return said(tpu, tmp_path_factory.mktemp("tpu") / "tpu.json")


def row(compiled, name, dtype):
    (found,) = [r for r in compiled["rows"] if (r["row"], r["dtype"]) == (name, dtype)]
    assert "error" not in found, found["error"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_pruning_needs_little_memory_beside_the_bare_step(compiled, name, dtype):
    limit = MEMORY[name][DTYPES.index(dtype)]
    assert row(compiled, name, dtype)["temporary_above_bare"] <= SLACK * limit + 0.001


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_every_donated_buffer_is_aliased(compiled, name, dtype):
    found = row(compiled, name, dtype)
    assert found["aliased"] == found["donated"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_between_events_little_is_read_beside_the_bare_step(compiled, name, dtype):
    assert row(compiled, name, dtype)["bytes_between_over_bare"] - 1 <= SLACK * (BETWEEN[name] - 1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_pruning_adds_only_small_all_reduces(compiled, name, dtype):
    found = row(compiled, name, dtype)
    assert found["largest_added"] <= LARGEST[name]
    assert found["kinds_added"] in ([], ["all-reduce"])


@pytest.mark.slow
def test_across_ranks_seventy_billion_weights(compiled):
    assert "error" not in compiled["llama"], compiled["llama"]["error"]
    assert compiled["llama"]["weights"] > 68e9
    assert compiled["llama"]["aliased"] == compiled["llama"]["donated"]


@pytest.mark.slow
def test_a_product_with_an_eighth_of_the_blocks_takes_a_fraction_of_the_cycles(tmp_path):
    cases = said(tpu_blocks, tmp_path / "tpu_blocks.json")["cases"]
    assert len(cases) == 6
    for case in cases:
        assert case["plain_over_dense"] < 0.7, case
        assert case["kernel_over_dense"] < 0.35, case
        assert case["kernel"] < case["plain"] / 1.3, case
