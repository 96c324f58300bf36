"""Our nodes in what ``jax.export`` and orbax-export serialize."""

import contextlib
import json
from typing import Any

from jax import export


def serialize_tuple(node: Any) -> None:
    """Let exported functions take and return a named tuple."""
    with _once():
        export.register_namedtuple_serialization(node, serialized_name=f"jaxprune.{node.__name__}")


def serialize_shaped(node: Any) -> None:
    """The same for a node that knows a shape, and a block maybe, beside its arrays."""
    with _once():
        export.register_pytree_node_serialization(
            node,
            serialized_name=f"jaxprune.{node.__name__}",
            serialize_auxdata=_to_json,
            deserialize_auxdata=_from_json,
        )


def _to_json(fixed: tuple[tuple[int, ...], tuple[int, ...]]) -> bytes:
    """Shape and block; without a block the shape alone, as it was written before there were any."""
    shape, block = fixed
    return json.dumps([shape, block] if block else shape).encode()


def _from_json(data: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    read = json.loads(bytes(data))
    shape, block = read if read and isinstance(read[0], list) else (read, ())
    return tuple(shape), tuple(block)


def _once() -> contextlib.AbstractContextManager[None]:
    """A module that is loaded again keeps its first registration: JAX cannot undo one."""
    return contextlib.suppress(ValueError)
