"""Reads collectives, loops and large arrays from the text form (HLO) of a compiled program.

The text is the only interface that all of XLA's compilers share. A line looks like

    %name = f32[2,16]{1,0:T(2,128)} all-reduce(%a, %b), ..., metadata={op_name="jit(f)/.../psum"}
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.step.gradients import GATHER_SCOPE, MEAN_SCOPE

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "send",
)
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLS = ("while", "conditional", "call", "call-start", "async-start")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|branch_computations)=\{?([^,}\s]+)")

# Modules of collectives that belong to the step rather than to the model.
UPDATE = "gradients, statistics, metrics"
GATHERED = "all-gathered params"
ELSEWHERE = "(not attributed)"


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind and one module in a step.

    Attributes:
        kind: "all-reduce", "all-gather", "reduce-scatter", ...
        module: the path of the module, such as "Block_0/BatchNorm_1".
        count: how many run in a step.
        bytes: bytes of all results on one device; for a reduce-scatter those of the operands, which
            are what moves.
        asynchronous: whether the compiler overlaps it with other work.
    """

    kind: str
    module: str
    count: int
    bytes: int
    asynchronous: bool = False


@dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def op_name(self) -> str:
        """Where it comes from in the Python program; "" if XLA has lost it."""
        match = _OP_NAME.search(self.rest)
        return match[1] if match else ""


@dataclass(frozen=True)
class Array:
    """One large result: its shape, bytes and source."""

    shape: str
    bytes: int
    source: str


def find_collectives(text: str) -> list[Collective]:
    """All collectives of a program, grouped by kind and module, in program order.

    XLA combines collectives. Each element of a combined one is attributed through the name on the
    instruction that reads it. The module with the most bytes gets the count.
    """
    counts: Counter[tuple[str, str, bool]] = Counter()
    sizes: Counter[tuple[str, str, bool]] = Counter()
    computations = _computations(text)
    beside = _started(computations)
    for name, times in _calls(computations).items():
        lines = computations[name]
        readers = _readers(lines)
        for line in lines:
            asynchronous = line.opcode.endswith("-start") or name in beside
            kind = line.opcode.removesuffix("-start")
            if kind not in _COLLECTIVES:
                continue
            elements = _elements(line)
            scale = 1.0
            if kind == "reduce-scatter":
                scale = _operand_bytes(line, lines) / sum(map(size_of, elements))
            modules: Counter[str] = Counter()
            for index, element in enumerate(elements):
                source = readers.get((line.name, index), "") if len(elements) > 1 else ""
                source = source or line.op_name or _reducer(line, computations)
                modules[module_of(source)] += round(scale * size_of(element))
            for module, size in modules.items():
                sizes[kind, module, asynchronous] += times * size
                counts[kind, module, asynchronous] += 0
            counts[kind, modules.most_common(1)[0][0], asynchronous] += times
    return [Collective(k, m, count, sizes[k, m, a], a) for (k, m, a), count in counts.items()]


def loop_factor(text: str) -> float:
    """The ratio of bytes moved to bytes moved if each loop ran once, which is what XLA counts."""
    computations = _computations(text)
    once = _calls(computations, multiply=False)
    moved = {
        name: sum(size_of(line.shape) for line in lines) for name, lines in computations.items()
    }
    counted_once = sum(moved[name] for name in once)
    all_of_it = sum(moved[name] * times for name, times in _calls(computations).items())
    return all_of_it / counted_once if counted_once else 1.0


def largest_arrays(text: str, count: int = 5) -> list[Array]:
    """The largest results in a program, one per size and module."""
    found: dict[tuple[int, str], Array] = {}
    computations = _computations(text)
    for name in _calls(computations):
        for line in computations[name]:
            if line.opcode in ("parameter", "tuple", "get-tuple-element", "bitcast", "while"):
                continue
            for element in _elements(line):
                array = Array(
                    element.split("{")[0], size_of(element), source_of(line.op_name, line.opcode)
                )
                found.setdefault((array.bytes, module_of(line.op_name)), array)
    return sorted(found.values(), key=lambda array: -array.bytes)[:count]


def module_of(op_name: str) -> str:
    """The path of the module: `jit(f)/jvp(ResNet)/Block_0/Conv_1/dot` gives `Block_0/Conv_1`."""
    if GATHER_SCOPE in op_name:  # its transpose reduces gradients
        return UPDATE if op_name.endswith("scatter") else GATHERED
    if MEAN_SCOPE in op_name:
        return UPDATE
    # XLA joins names with colons; the first one counts.
    parts = [part for part in _unwrapped(op_name.split(":")[0])[:-1] if part]
    # The first part is the model; it is left out unless it is the only part.
    return "/".join(parts[1:] or parts) or ELSEWHERE


def source_of(op_name: str, opcode: str) -> str:
    """A readable source of an instruction: `Block_0/Conv_1 (backward)`."""
    module = module_of(op_name)
    return f"{module} (backward)" if "transpose(" in op_name else f"{module} ({opcode})"


def size_of(shape: str) -> int:
    """Bytes of a shape, or of all shapes in a tuple, without padding."""
    total = 0
    for dtype, dims in _SHAPE.findall(shape):
        bits = _BITS.get(dtype)
        if bits is None:
            digits = re.search(r"\d+", dtype)
            bits = int(digits[0]) if digits else 0
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


def _operand_bytes(line: Instruction, lines: list[Instruction]) -> int:
    """Bytes of the operands of an instruction."""
    shapes = {other.name: other.shape for other in lines}
    names = re.findall(r"%?([\w.\-]+)", line.rest.partition(")")[0])
    return sum(size_of(shapes[name]) for name in names if name in shapes)


def _elements(line: Instruction) -> list[str]:
    """The results of a collective. The tuple of a -start may list its operands before them."""
    text = re.sub(r"\{[^}]*\}", "", line.shape)  # layouts
    nested = line.opcode.endswith("-start") and text.startswith("((")
    if nested:
        text = text[text.index(")") :]
    shapes = re.findall(r"[a-z]\w*\[[\d,]*\]", text)
    if nested:
        return shapes
    if line.opcode in ("all-gather-start", "collective-permute-start") and len(shapes) > 1:
        operands = line.rest.split(")")[0].count("%")
        return shapes[operands : 2 * operands] or shapes[-1:]
    if line.opcode == "send":
        return shapes[:1]
    return shapes


def _readers(lines: list[Instruction]) -> dict[tuple[str, int], str]:
    """The op_name of each get-tuple-element, by tuple and index."""
    found = {}
    for line in lines:
        if line.opcode == "get-tuple-element" and line.op_name:
            match = re.search(r"([\w.\-]+)\), index=(\d+)", line.rest)
            if match:
                found[match[1], int(match[2])] = line.op_name
    return found


def _reducer(line: Instruction, computations: dict[str, list[Instruction]]) -> str:
    """The op_name in the reduction of an all-reduce, for one that has lost its own."""
    match = re.search(r"to_apply=%?([\w.\-]+)", line.rest)
    inside = computations.get(match[1], []) if match else []
    return next((inner.op_name for inner in inside if inner.op_name), "")


# Parts of a name that are not modules: functions under `jit`, and jax's own names.
_FUNCTIONS = ("jit", "pjit", "pmap", "custom_jvp", "custom_vjp")
_MACHINERY = (
    "shard_map",
    "while",
    "body",
    "cond",
    "checkpoint",
    "closed_call",
    "eval_jaxpr",
    "rematted_computation",
)


def _unwrapped(op_name: str) -> list[str]:
    """The parts of a name, without transformations such as `jvp(...)`."""
    parts = []
    for part in op_name.split("/"):
        outer = ""
        while match := re.fullmatch(r"(\w+)\((.*)\)", part):
            outer, part = match[1], match[2]
            if outer in _FUNCTIONS:
                break
        if outer not in _FUNCTIONS and part not in _MACHINERY:
            parts.append(part)
    return parts


def _computations(text: str) -> dict[str, list[Instruction]]:
    """The lines of each computation, by name; "ENTRY" is the program itself."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for raw in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        header = _COMPUTATION.match(raw)
        if header:
            current = found.setdefault("ENTRY" if header[1] else header[2], [])
            continue
        line = _LINE.match(raw)
        if line:
            current.append(Instruction(line[1], line[2], line[3], line[4]))
    return found


def _calls(computations: dict[str, list[Instruction]], *, multiply: bool = True) -> Counter[str]:
    """How often each computation runs: the program, its loops and calls.

    Fused computations are left out: their intermediate results never reach memory.
    """
    times: Counter[str] = Counter()

    def run(name: str, count: int) -> None:
        times[name] += count
        for line in computations.get(name, []):
            if line.opcode in _CALLS:
                trips = _TRIPS.search(line.rest) if line.opcode == "while" and multiply else None
                for called in _called(line):
                    if called in computations:
                        run(called, count * (int(trips[1]) if trips else 1))

    run("ENTRY", 1)
    return times


def _started(computations: dict[str, list[Instruction]]) -> set[str]:
    """Computations that run asynchronously, such as those of a TPU's SparseCore."""
    return {
        called
        for lines in computations.values()
        for line in lines
        if line.opcode.endswith("-start")
        for called in _called(line)
    }


def _called(line: Instruction) -> Iterator[str]:
    for match in _CALLED.finditer(line.rest):
        yield match[1].lstrip("%")
