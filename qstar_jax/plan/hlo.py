"""Reads the text of compiled programs (XLA's HLO): computations, their instructions, and how often they run."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import Any

_TYPE = re.compile(r"\b([a-z]+\d\w*|pred)\[([\d,]*)\](?:\{[^{}]*(S\(1\))[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_CALLEES = re.compile(
    r"\b(body|condition|calls|to_apply|true_computation|false_computation|branch_computations|called_computations)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)


@dataclass(frozen=True)
class Array:
    """Type of an array.

    Attributes:
        dtype: As XLA writes it: bf16, f32, s32, ...
        shape: Its dimensions.
        on_chip: Whether it lies within a TPU's core, not in its memory.
    """

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = field(default=False, compare=False)

    @property
    def memory_bytes(self) -> int:
        """Bytes that it takes of the memory."""
        return 0 if self.on_chip else self.nbytes

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        bits = 8 if self.dtype == "pred" else int(re.search(r"\d+", self.dtype).group())
        return -(-self.size * bits // 8)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: Unique in the module.
        opcode: dot, fusion, while, custom-call, ...
        results: Arrays that it makes, several if it makes a tuple.
        operands: Names of the instructions that it reads.
        attributes: What follows the operands, as text.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def source(self) -> str:
        """The JAX operation that it came from, such as jit(step)/transpose(jvp())/dot_general."""
        return self.find(r'op_name="([^"]*)"') or ""

    @property
    def callees(self) -> Iterator[tuple[str, str]]:
        """Yields (role, name) of the computations that it runs; roles are body, condition, calls, ..."""
        for role, group, name in _CALLEES.findall(self.attributes):
            for callee in re.findall(r"[\w.\-]+", group or name):
                yield role, callee

    @property
    def target(self) -> str:
        """Target of a custom call; empty for other instructions."""
        return (self.opcode == "custom-call" and self.find(r'custom_call_target="([^"]*)"')) or ""

    @property
    def config(self) -> dict[str, Any]:
        """What the compiler for the device decided; empty if it is not JSON."""
        _, _, text = self.attributes.partition("backend_config=")
        try:
            config, _ = json.JSONDecoder().raw_decode(text)
        except ValueError:
            return {}
        return config if isinstance(config, dict) else {}

    def find(self, pattern: str) -> str | None:
        """Returns the first group of a regular expression in the attributes, or None."""
        match = re.search(pattern, self.attributes)
        return match and match.group(1)

    def numbers(self, pattern: str) -> tuple[int, ...]:
        """Returns the whole numbers in what `find` finds."""
        return tuple(map(int, re.findall(r"\d+", self.find(pattern) or "")))


@dataclass(frozen=True)
class Loop:
    """A loop.

    Attributes:
        trips: How often its body runs each time; None if that depends on data.
        runs: How often the loop is entered per call of the program.
        source: The JAX operation that it came from.
    """

    trips: int | None
    runs: float
    source: str


@dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
        computations: Name -> instructions by name, in their order. The root of a computation comes last.
        entry: Name of the computation that is called.
        unknown_trips: Trips assumed of loops whose number of trips depends on data, in the order in which they are
            entered, an outer loop before those inside it; of further ones 1.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str
    unknown_trips: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str, unknown_trips: tuple[float, ...] = ()) -> "Module":
        """Reads what `jax.stages.Compiled.as_text()` returns."""
        computations: dict[str, dict[str, Instruction]] = {}
        entry, current = "", None
        for line in text.splitlines():
            if line.startswith("}"):
                current = None
            elif current is None and (header := _HEADER.match(line)):
                current = computations.setdefault(header.group(2), {})
                entry = header.group(2) if header.group(1) else entry
            elif current is not None and (match := _INSTRUCTION.match(line)):
                current[match.group(1)] = _instruction(match.group(1), line[match.end() :])
        return cls(computations, entry, unknown_trips)

    @cached_property
    def runs(self) -> Mapping[str, float]:
        """How often each computation runs per call; a branch as if all branches were equally likely."""
        calls = defaultdict(list)
        for name, instructions in self.computations.items():
            for instruction in instructions.values():
                calls[name] += self._calls(instruction)
        runs, pending = Counter(), [(self.entry, 1.0)]
        while pending:  # computations never call each other in a circle
            name, times = pending.pop()
            runs[name] += times
            pending += [(callee, times * factor) for callee, factor in calls[name]]
        return runs

    def _calls(self, instruction: Instruction) -> Iterator[tuple[str, float]]:
        callees = list(instruction.callees)
        for role, name in callees:
            if instruction.opcode == "while":
                trips = self._trips(instruction)
                trips = self._assumed_trips[instruction.name] if trips is None else trips
                yield name, trips if role == "body" else trips + 1
            else:
                yield name, 1 / len(callees) if instruction.opcode == "conditional" else 1.0

    @cached_property
    def _assumed_trips(self) -> Mapping[str, float]:
        """Name of each loop with an unknown number of trips -> those assumed."""
        names = list(dict.fromkeys(self._unknown_loops(self.entry)))
        return dict(zip_longest(names, self.unknown_trips[: len(names)], fillvalue=1.0))

    def _unknown_loops(self, computation: str) -> Iterator[str]:
        for x in self.computations[computation].values():
            if x.opcode == "while" and self._trips(x) is None:
                yield x.name
            for _, callee in x.callees:
                yield from self._unknown_loops(callee)

    def _trips(self, loop: Instruction) -> int | None:
        if known := loop.config.get("known_trip_count"):
            return int(known["n"])
        return self._counted_trips(**dict(loop.callees))

    def _counted_trips(self, condition: str, body: str) -> int | None:
        """Trips of a loop whose counter goes up from 0 by a constant to a constant: TPUs' programs do not say them."""
        test = list(self.computations[condition].values())[-1]
        if test.opcode != "compare" or test.find(r"direction=(\w+)") != "LT":
            return None
        counter, limit = (self.computations[condition][name] for name in test.operands)
        index, inside = counter.numbers(r"index=(\d+)"), self.computations[body]
        result = list(inside.values())[-1]
        if limit.opcode != "constant" or not index or result.opcode != "tuple":
            return None
        # XLA may have unrolled the loop, whose counter then goes up by more than 1.
        update = inside[result.operands[index[0]]]
        while update.opcode == "copy":
            update = inside[update.operands[0]]
        steps = [inside[name] for name in update.operands if inside[name].opcode == "constant"]
        if update.opcode != "add" or len(steps) != 1:
            return None
        return -(-_value(limit) // _value(steps[0]))

    def instructions(self, opcodes: str) -> Iterator[tuple[str, Instruction, float]]:
        """Yields (computation, instruction, runs) of those that run and whose opcode matches a regular expression."""
        pattern = re.compile(opcodes)
        for name, instructions in self.computations.items():
            if self.runs[name]:
                for instruction in instructions.values():
                    if pattern.fullmatch(instruction.opcode):
                        yield name, instruction, self.runs[name]

    def operands(self, computation: str, instruction: Instruction) -> list[Array]:
        """Types of the arrays that an instruction reads."""
        inside = self.computations[computation]
        return [array for name in instruction.operands if name in inside for array in inside[name].results]

    @property
    def loops(self) -> list[Loop]:
        """All loops that are entered."""
        return [Loop(self._trips(x), runs, x.source) for _, x, runs in self.instructions("while")]


def _value(constant: Instruction) -> int:
    return constant.numbers(r"^\((\d+)\)")[0]


def _instruction(name: str, text: str) -> Instruction:
    """Parses what follows `name = `: a type, an opcode, operands in parentheses, and attributes."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opcode, _, _ = text[end:].strip().partition("(")
    start = text.index("(", end)
    stop = _closing(text, start)
    results = tuple(Array(dtype, _dims(shape), bool(space)) for dtype, shape, space in _TYPE.findall(text[:end]))
    operands = tuple(re.findall(r"%([\w.\-]+)", text[start:stop]))
    # Constants keep their value as an attribute.
    attributes = text[stop:] if operands else text[start:]
    return Instruction(name, opcode, results, operands, attributes)


def _closing(text: str, start: int) -> int:
    """Returns the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced parentheses: {text[:200]}")


def _dims(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()
