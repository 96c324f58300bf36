"""Compiled programs that outlive their process, so that a run that goes on starts at once."""

import platform

import jax


def keep() -> None:
    """Let jax keep what it compiles in the user's cache, unless it has been told where already.

    A program that comes from there is, byte for byte, the one that was compiled, so its numbers
    are the same. It fits one kind of processor: every machine has a folder of its own.
    """
    import pooch

    if jax.config.jax_compilation_cache_dir is None:
        folder = pooch.os_cache("jaxprune") / "programs" / platform.node()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
