"""The masks of today are those of yesterday; a change needs a sentence in the changelog."""

import json

import pytest

from tests.golden.make import FILE, masks, rows

GOLDEN = json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def found():
    return masks()


@pytest.mark.parametrize("name", GOLDEN)
def test_masks_have_not_changed(found, name):
    assert rows(found[name]) == GOLDEN[name]


def test_every_golden_mask_is_made_and_kept(found):
    assert list(found) == list(GOLDEN)
