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
    """The same for a node that knows a shape beside its arrays."""
    with _once():
        export.register_pytree_node_serialization(
            node,
            serialized_name=f"jaxprune.{node.__name__}",
            serialize_auxdata=lambda shape: json.dumps(shape).encode(),
            deserialize_auxdata=lambda data: tuple(json.loads(bytes(data))),
        )


def _once() -> contextlib.AbstractContextManager[None]:
    """A module that is loaded again keeps its first registration: JAX cannot undo one."""
    return contextlib.suppress(ValueError)
