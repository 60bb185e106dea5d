"""What a compiled program does: its products of matrices, and what its devices say to one another.

Promises: a loop's body counts as often as it runs, which XLA's own `cost_analysis()` does not do.
Knows nothing of models, and takes jaxprs and HLO text as they are, without jax.
"""

import math
import re
from typing import Any

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


def product_flops(jaxpr: Any) -> int:
    """Floating-point operations of a jaxpr's matrix products, on all devices together; a multiply-add is two.

    A scan counts as often as it is long, a cond as its dearest branch, a while loop's body once.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, settings = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = settings["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
            continue
        inner = [product_flops(one) for value in settings.values() for one in _jaxprs(value)]
        if name == "cond":
            total += max(inner)
        else:
            devices = settings["mesh"].size if name == "shard_map" else 1
            total += sum(inner) * (settings["length"] if name == "scan" else devices)
    return total


def _jaxprs(value: Any) -> list:
    values = value if isinstance(value, list | tuple) else [value]
    closed = [getattr(one, "jaxpr", one) for one in values]
    return [one for one in closed if hasattr(one, "eqns")]


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """{"all-gather": {"count", "bytes"}, ...} of one run of an optimized program on one device.

    Bytes are those of what the operation gives, and for the reduce-scatter that a TPU writes as an all-reduce of which
    a part is kept, of the whole.  A loop whose number of rounds the program does not fix counts as one round.
    """
    computations, entry = _computations(hlo)
    found: dict[tuple, tuple[str, int, int]] = {}

    def walk(name: str, times: int, path: tuple) -> None:
        for line in computations[name]:
            if match := _COLLECTIVE.search(line):
                kind = "reduce-scatter" if "all-reduce-scatter" in name else match["kind"]
                # A TPU spreads one collective over several fusions, which share the numbers of a chain.
                chain = re.search(r'chain_id="(\d+)"', line)
                channel = re.search(r"channel_id=(\d+)", line)
                key = (path, chain[1], channel[1]) if chain and channel else (path, name, line)
                found[key] = (kind, times, _bytes(match["shape"], match["start"]))
            if " while(" in line:
                condition, body = (re.search(rf"{part}=(%?[\w.-]+)", line)[1] for part in ("condition", "body"))
                walk(body, times * _rounds(line, computations[condition]), (*path, body))
                continue
            for called in _CALLED.finditer(line):
                for one in re.findall(r"%?[\w.-]+", called[1]):
                    if one in computations:
                        walk(one, times, path)

    walk(entry, 1, ())
    totals: dict[str, dict[str, int]] = {}
    for kind, times, size in found.values():
        total = totals.setdefault(kind, {"count": 0, "bytes": 0})
        total["count"] += times
        total["bytes"] += times * size
    return dict(sorted(totals.items()))


_COLLECTIVE = re.compile(rf" = (?P<shape>\(.*?\)|\S+) (?P<kind>{'|'.join(COLLECTIVES)})(?P<start>-start)?\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|branch_computations|called_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.-]+)"
)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Name -> instructions, and the name of the entry."""
    computations, entry, current = {}, "", []
    for line in hlo.splitlines():
        if match := re.match(r"(ENTRY )?(%?[\w.-]+) \(.*\{$", line):
            current = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        elif line.startswith(" "):
            current.append(line)
    return computations, entry


def _rounds(line: str, condition: list[str]) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    bounds = [match[1] for one in condition if (match := re.search(r"s32\[\]\S* constant\((\d+)\)", one))]
    return int(bounds[0]) if len(bounds) == 1 and len(condition) <= 4 else 1


def _bytes(shape: str, start: str | None) -> int:
    """Of 'bf16[8,128]{1,0}', or of a tuple of such.  What a -start gives holds its operand too, or synchronization."""
    sizes = []
    for kind, axes in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        sizes.append(_BYTES.get(kind, 1) * math.prod(int(axis) for axis in axes.split(",") if axis))
    return int(max(sizes) if start else sum(sizes))
