"""Strict settings for every test, and quick compilation where only values matter."""

import os
import shutil
import tempfile
from importlib.util import find_spec

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

STARTED_BY_ANOTHER = "PYTEST_XDIST_WORKER" in os.environ
CACHE = "JAX_COMPILATION_CACHE_DIR"

# Compiling takes most of the time here, and running next to none. So programs are not optimised,
# and what one process of a run has compiled is there for all of them: the workers, and what they
# start, which inherit the environment. The folder ends with the run that made it.
SETTINGS = {
    CACHE: os.environ.get(CACHE) if STARTED_BY_ANOTHER else tempfile.mkdtemp(prefix="jaxprune-"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
    "JAX_DISABLE_MOST_OPTIMIZATIONS": True,
    "JAX_NUMPY_RANK_PROMOTION": "raise",
}
FLAGS = ["--xla_force_host_platform_device_count=8"]
if jax.__version_info__ < (0, 11):  # XLA ends the process at a flag that it does not know
    # Small programs are compiled in a third of the time: by the plain emitters, and in one piece.
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]

for name, value in SETTINGS.items():
    jax.config.update(name.lower(), value)
    if name != "JAX_NUMPY_RANK_PROMOTION":  # other processes are users
        os.environ[name] = str(value)
# Read when JAX starts its backend, which importing it does not.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process compiles the sources of jax


def pytest_unconfigure():
    if not STARTED_BY_ANOTHER:
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Skip the example of a package that has no wheel for Python 3.14."""
    for item in items:
        if item.name == "jaxprune.export._coreml.coreml" and not find_spec("coremltools"):
            item.add_marker(pytest.mark.skip(reason="coremltools is not installed"))


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(autouse=True)
def as_users_compile(request):
    """Compile anew and in full for a test marked `optimized`, which looks at the program itself."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    settings = {"jax_enable_compilation_cache": False, "jax_disable_most_optimizations": False}
    jax.clear_caches()
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in settings.items():
        jax.config.update(name, not value)
    compilation_cache.reset_cache()
