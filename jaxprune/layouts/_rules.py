"""Rules of a convention: by name and number of axes, of which some say that nobody can tell."""

from jaxprune._use import Entry, Role, Use

LOOKED_UP = "its rows are looked up"
ELEMENTWISE = "it is neither summed over nor made by a product"


def rule(path: str, kind: str, *axes: Role, why: str = "") -> Entry:
    """Say what the axes of leaves of some name are, if they have as many axes."""
    reasons = tuple("" if role else why for role in axes)
    return Entry(path, (Use(kind, axes, reasons),), optional=True)


def unknown(path: str, *ranks: int, why: str) -> list[Entry]:
    """Say that leaves of some name and so many axes cannot be told."""
    return [rule(path, "unknown", *[None] * rank, why=why) for rank in ranks]


def gains(path: str) -> list[Entry]:
    """Say that leaves of some name are gains, be they stacked or not."""
    why = "a gain, or a stack of gains"
    stacks = [rule(path, "gain", *[None] * rank, why=why) for rank in (2, 3)]
    return [rule(path, "gain", None, why=ELEMENTWISE), *stacks]
