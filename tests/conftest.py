"""Strict settings for every test: eight CPU devices, no silent rank promotion."""

import os

# Read when JAX starts its backend, which importing it does not.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    return jax.random.key(0)
