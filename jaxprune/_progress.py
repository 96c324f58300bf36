"""A progress bar over what a walk passes, where ``tqdm`` is installed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def bar(name: str, *, shown: bool) -> Callable[[Sequence[T]], Iterator[T]]:
    """What a walk goes through its stops with: a bar of that name, or nothing."""
    show: Callable[..., Iterable[T]] | None = None
    if shown:
        try:
            from tqdm.auto import tqdm

            show = tqdm
        except ImportError:
            show = None
    return lambda stops: iter(show(stops, desc=name, unit="stop") if show else stops)
