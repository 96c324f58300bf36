"""Read a compiled program's text: cycles, loops, collectives and aliased buffers.

Only what the TPU compiler writes is understood. What cannot be told raises ``ValueError``.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      type: of the result, with its layout.
      opcode: what it does, such as ``fusion``.
      operands: names of what it reads; the value of a constant.
      rest: attributes behind the operands.
      root: whether it is what the computation gives.
    """

    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


class Program(NamedTuple):
    """A program: instructions by name, by computation; and the computation that is run."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str


def parse(text: str) -> Program:
    """Take a program's text apart."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?(\S+) \(.*\{$", line)
        if header:
            computations[header[2]] = current = {}
            entry = header[2] if header[1] else entry
        elif named := re.match(r"\s+(ROOT )?%(\S+) = (.*)", line):
            current[named[2]] = _instruction(named[3], root=bool(named[1]))
    if not entry:
        raise ValueError("The text has no line that begins with ENTRY: it is no compiled program.")
    return Program(computations, entry)


def _instruction(text: str, *, root: bool) -> Instruction:
    """``f32[2]{0} add(%a, %b), metadata=...``, the type perhaps a tuple in parentheses."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opened = text.index("(", end)
    closed = _closing(text, opened)
    operands = tuple(name.strip(" %") for name in text[opened + 1 : closed].split(","))
    return Instruction(
        text[:end], text[end:opened].strip(), operands, text[closed + 1 :].strip(", "), root
    )


def _closing(text: str, opened: int) -> int:
    """Position of the parenthesis or brace that closes the one at ``opened``."""
    depth = 0
    for i in range(opened, len(text)):
        depth += (text[i] in "({") - (text[i] in ")}")
        if not depth:
            return i
    raise ValueError(f"A parenthesis is never closed: {text[opened : opened + 60]}")


def bytes_of(type_: str) -> int:
    """Bytes of a type, of all parts of a tuple; layouts and padding aside."""
    bits = 0
    for dtype, shape in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", type_):
        width = re.match(r"[a-z]+(\d+)", dtype)
        size = 1
        for axis in filter(None, shape.split(",")):
            size *= int(axis)
        bits += size * (8 if dtype == "pred" else int(width[1]) if width else 0)
    return bits // 8


def collectives(program: Program) -> Counter[tuple[str, int]]:
    """Count collectives by kind and bytes of what a device hands in.

    One that runs beside other work is written where it starts, goes on and ends: kind and channel
    tell that it is one.
    """
    found = {}
    for name, computation in program.computations.items():
        for each, instruction in computation.items():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            given = [computation[o].type for o in instruction.operands if o in computation]
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = (kind, channel[1]) if channel else (name, each)
            found[key] = kind, sum(map(bytes_of, given))
    return Counter(found.values())


def aliased(text: str) -> int:
    """Count the arguments whose buffers the results are written to."""
    head = text.splitlines()[0]
    start = head.find("input_output_alias={")
    if start < 0:
        return 0
    opened = head.index("{", start)
    return len(set(re.findall(r"\((\d+), \{", head[opened : _closing(head, opened)])))


def rounds(program: Program, loop: Instruction) -> int | None:
    """Rounds of a loop that counts up to a constant, as of a scan; None where data decides.

    The count is taken to start at 0 and to go up by 1.
    """
    condition = program.computations[_named(loop, "condition")]
    root = next(i for i in condition.values() if i.root)
    if root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    bound = condition[root.operands[1]]
    return int(bound.operands[0]) if bound.opcode == "constant" else None


def cycles(program: Program) -> int:
    """Add the compiler's estimates for one run of a program in which no event is due.

    A loop of known rounds counts as often, one whose rounds depend on data (a search, an event)
    not at all, and of a conditional the cheapest branch. Collectives have no estimate.

    Raises:
      ValueError: a loop of the network, forward or backward, has no known number of rounds.
    """
    return _cycles(program, program.entry)


def _cycles(program: Program, name: str) -> int:
    total = 0
    for instruction in program.computations[name].values():
        estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
        total += int(estimate[1]) if estimate else 0
        if instruction.opcode == "while":
            count = rounds(program, instruction)
            if count is None and "jvp(" in instruction.rest:
                raise ValueError("A loop of the network does not say how many rounds it takes.")
            total += (count or 0) * _cycles(program, _named(instruction, "body"))
        elif instruction.opcode == "conditional":
            total += min(_cycles(program, branch) for branch in _branches(instruction))
        elif instruction.opcode == "call":
            total += _cycles(program, _named(instruction, "to_apply"))
    return total


def bundles(text: str) -> Counter[int]:
    """Count the bundles of a kernel's schedule by how many loops are around them."""
    lines = re.findall(r"^\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:( >*) \{", text, re.MULTILINE)
    return Counter(line.count(">") for line in lines)


def searches(program: Program) -> int:
    """Count loops whose rounds depend on data, and conditionals."""
    every = [i for computation in program.computations.values() for i in computation.values()]
    loops = [i for i in every if i.opcode == "while" and rounds(program, i) is None]
    return len(loops) + sum(i.opcode == "conditional" for i in every)


def _named(instruction: Instruction, attribute: str) -> str:
    found = re.search(rf"{attribute}=%?([^\s,]+)", instruction.rest)
    if not found:
        raise ValueError(f"A {instruction.opcode} has no {attribute}: {instruction.rest[:100]}")
    return found[1]


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
    if listed:
        return [name.strip(" %") for name in listed[1].split(",")]
    return [_named(instruction, f"{which}_computation") for which in ("true", "false")]
