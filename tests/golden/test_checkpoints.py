"""Files of earlier versions come back bit for bit."""

import shutil

import jax
import pytest

import jaxprune as jp
from tests.golden.checkpoints import BLOCKS, MODEL, RUN, blocks, model, run
from tests.helpers import assert_trees_equal


def test_a_model_that_an_earlier_version_saved_is_read():
    params, masks = model()
    want = jp.apply_masks(jax.tree.map(jax.numpy.asarray, params), masks)
    got, its_masks = jp.checkpoint.load(MODEL, like=params)
    assert_trees_equal(got, {**want, "rate": 0.5})
    assert_trees_equal(its_masks, masks)


def test_a_run_that_an_earlier_version_saved_goes_on(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    shutil.unpack_archive(RUN, tmp_path)
    got = jp.checkpoint.restore_run(tmp_path / "run", run(), config={"rate": 0.2})
    same = lambda tree: {**tree, "key": jax.random.key_data(tree["key"])}
    assert_trees_equal(same(got), same(run()))


def test_a_run_saved_with_a_bit_a_weight_goes_on_with_a_bit_a_block(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    shutil.unpack_archive(BLOCKS, tmp_path)
    want, start = blocks()
    got = jp.checkpoint.restore_run(tmp_path / "run", start)
    assert_trees_equal(got, want)
    assert got.masks["kernel"].block == (2, 4)
