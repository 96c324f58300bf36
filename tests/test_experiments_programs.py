"""Tests of experiments/common/programs.py."""

import jax
import pooch
import pytest

from experiments.common import programs

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def restored():
    """Nothing is compiled in these tests, so jax has not looked at its settings yet."""
    before = {option: getattr(jax.config, option) for option in OPTIONS}
    yield
    for option, value in before.items():
        jax.config.update(option, value)


def test_programs_are_kept_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    monkeypatch.setattr("platform.node", lambda: "here")
    jax.config.update("jax_compilation_cache_dir", None)
    programs.keep()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jaxprune" / "programs" / "here")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_programs_stay_where_the_user_has_them(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3.0)
    programs.keep()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 3.0
