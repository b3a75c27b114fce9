"""Reads an optimized program: its kernels, collectives, host transfers and calls."""

import dataclasses
import functools
import math
import re
from collections import Counter
from typing import Any

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "collective-permute"),
    *("all-to-all", "ragged-all-to-all", "collective-broadcast"),
)
HOST = {"infeed", "outfeed"}
HOST_TARGETS = re.compile(r"callback|host|infeed|outfeed", re.I)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the program."""

    name: str
    computation: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def target(self) -> str:
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def bytes(self) -> int:
        return size(self.shape)


def size(shape: str) -> int:
    """Bytes of an array or a tuple of arrays."""
    arrays = re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", shape)
    return sum(
        BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in arrays
    )


class Program:
    """The optimized program of one device."""

    def __init__(self, text: str) -> None:
        self.instructions = list(parse(text))
        self.by_name = {one.name: one for one in self.instructions}

    @functools.cached_property
    def inside(self) -> set[str]:
        """Computations that are part of a kernel: bodies of fusions, and reducers."""
        found: set[str] = set()
        for one in self.instructions:
            kinds = "to_apply" if one.opcode not in ("call", "fusion") else "calls"
            if one.opcode != "call":
                found |= set(re.findall(rf"{kinds}=%?([\w.-]+)", one.attributes))
        return found

    @functools.cached_property
    def kernels(self) -> list[Instruction]:
        """Instructions that do work, wherever they stand but in fusions."""
        return [
            one
            for one in self.instructions
            if one.computation not in self.inside
            and one.opcode not in FREE
            and not one.opcode.endswith("-done")
        ]

    def moved(self, one: Instruction) -> int:
        """Bytes that an instruction reads and writes."""
        read = (
            self.by_name[name].bytes for name in one.operands if name in self.by_name
        )
        return one.bytes + sum(read)

    @property
    def kernel_bytes(self) -> int:
        return sum(self.moved(one) for one in self.kernels)

    def collectives(self) -> list[tuple[str, int]]:
        """Kind and bytes that go in, of every collective.

        One that runs beside other work stands in each kernel which drives it on, and is
        the same one everywhere: of one channel, which others of its kind may share.
        """
        found: dict[Any, tuple[str, int]] = {}
        for one in self.instructions:
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                given = (
                    self.by_name[n].bytes for n in one.operands if n in self.by_name
                )
                sent, key = (kind, sum(given)), (one.name,)
                channel = re.search(r"channel_id=\d+", one.attributes)
                if channel and one.computation in self.inside:
                    key = (channel[0], *sent)
                found.setdefault(key, sent)
        return sorted(found.values())

    def custom_calls(self) -> Counter[str]:
        """How often each function outside the program is called."""
        return Counter(one.target for one in self.instructions if one.target)

    def conditionals(self) -> int:
        """Branches that are taken at run time."""
        return sum(one.opcode == "conditional" for one in self.instructions)

    def host_transfers(self) -> list[str]:
        """Whatever leaves the device for the host, or waits for it."""
        return [
            one.target or one.opcode
            for one in self.instructions
            if one.opcode in HOST
            or "is_host_transfer=true" in one.attributes
            or (one.target and HOST_TARGETS.search(one.target))
        ]


def main_memory(report: str) -> int:
    """Bytes that a program takes of the device's main memory, by XLA's own report.

    Arguments, results and temporary arrays, each counted once. What a TPU holds on the
    chip is left out: there the compiler keeps whatever fits.
    """
    found = re.search(r"Memory Space: default .*\nTotal bytes: (\d+)", report)
    if not found:
        raise ValueError(f"No main memory in the report: {report[:200]!r}")
    return int(found[1])


def parse(text: str):
    """The instructions of the text form of a program, in order."""
    computation = ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = header[1]
            continue
        named = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)$", line)
        if not named:
            continue
        body = named[2]
        found = re.search(r"(?:^| )([a-z][\w-]*)\(([^)]*)\)", body)
        if not found:
            continue
        yield Instruction(
            name=named[1],
            computation=computation,
            shape=body[: found.start()],
            opcode=found[1],
            operands=tuple(re.findall(r"%([\w.-]+)", found[2])),
            attributes=body[found.end() :],
        )
