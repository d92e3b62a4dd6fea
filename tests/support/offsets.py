"""Which 32-bit arithmetic a compiled kernel's addresses are made of.

Sizes (N, V, D, strides, widths) may be as large as an int32 is; two of them together are not one. So,
in all that an address is computed from, a product of 32-bit integers must be one of these:

* a position: a constant times a number of tiles, that is, of what is made of program ids, tile counts
  (``TILE_COUNTS``) and constants only; the grid covers N and V;
* a size rounded to tiles: a constant times a quotient by a constant at least as large;
* a place in a tile: a constant times what a tile bounds: lanes, constants, remainders by constants, how many
  lanes before one are set;
* the first column of a share of a row: what counts the shares, program_id(1) or a reduced index by a
  constant, times their length;
* a place in a row's lists, whose length ``capacity`` a launch bounds by a constant, as it bounds the
  ``1 << bits`` places that a tile takes of one: a lane's list times ``capacity``, a tile's number shifted by
  ``bits``, a constant times a quotient by ``1 << bits`` (read only where a list fits its capacity).

And a sum must have an operand that a tile bounds, or be one of these:

* a share's first column and a length or a bound of its row;
* a number of tiles and another one, or a quotient by a constant.

Anything else has to be 64-bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TILE_COUNTS = ("tiles", "splits", "row_blocks")
_OPERATION = re.compile(r'^\s*(%[\w:]+(?:, %[\w:]+)*) = "?([\w.]+)"?[ (](.*)$')
_VALUE = re.compile(r"%\w+(?:#\d+)?")
_LOOP = re.compile(r"scf\.for (%\w+) = (%\w+) to (%\w+) step (%\w+)")
_CONSTANT = re.compile(r"^(?:dense<)?(-?\d+)>? :")
# What an address is followed back through.
_FOLLOWED = {
    "arith.addi", "arith.subi", "arith.muli", "arith.shli", "arith.extsi", "arith.extui", "arith.trunci",
    "arith.minsi", "arith.maxsi", "arith.select", "arith.divsi", "arith.remsi", "tt.splat", "tt.broadcast",
    "tt.expand_dims", "tt.reshape", "tt.addptr",
}  # fmt: skip


@dataclass(frozen=True)
class _Operation:
    name: str
    operands: tuple[str, ...]
    text: str

    @property
    def narrow(self) -> bool:
        """Whether the result is of 32-bit integers."""
        return re.search(r"(?:: |x|to )i32>?$", re.sub(r" loc\(.*\)$", "", self.text)) is not None


def _operations(ttir: str) -> dict[str, _Operation]:
    """Every value's operation, in order; a loop's variable is one of its bounds."""
    found: dict[str, _Operation] = {}
    for line in ttir.splitlines():
        if loop := _LOOP.search(line):
            found[loop[1]] = _Operation("loop", loop.groups()[1:], line)
        if operation := _OPERATION.match(line):
            results, name, rest = operation.groups()
            text = re.sub(r" loc\(.*\)$", "", rest)
            for result in results.split(", "):
                found[result.split(":")[0]] = _Operation(name, tuple(_VALUE.findall(text)), text)
    return found


class _Addresses:
    def __init__(self, ttir: str) -> None:
        self.values = _operations(ttir)

    def constant(self, value: str) -> int | None:
        operation = self.values.get(value)
        while operation is not None and operation.name in ("tt.splat", "tt.broadcast", "arith.extsi"):
            operation = self.values.get(operation.operands[0])
        number = _CONSTANT.match(operation.text) if operation and operation.name == "arith.constant" else None
        return int(number[1]) if number else None

    def is_argument(self, value: str, *names: str) -> bool:
        operation = self.values.get(value)
        while operation is not None and operation.name == "tt.splat":
            value = operation.operands[0]
            operation = self.values.get(value)
        return operation is None and value.lstrip("%").rstrip("_0123456789") in names

    def counts_tiles(self, value: str) -> bool:
        operation = self.values.get(value)
        if operation is None:
            return self.is_argument(value, *TILE_COUNTS)
        if operation.name in ("arith.constant", "tt.get_program_id"):
            return True
        return operation.name in _FOLLOWED and all(map(self.counts_tiles, operation.operands))

    def is_quotient(self, value: str, least: int) -> bool:
        """Whether it is a size divided by ``least`` or more, and perhaps by more."""
        operation = self.values.get(value)
        if operation is None or operation.name not in (
            "arith.divsi",
            "arith.addi",
            "arith.subi",
            "arith.minsi",
        ):
            return False
        if operation.name == "arith.divsi" and (self.constant(operation.operands[1]) or 0) >= least:
            return True
        return any(self.is_quotient(x, least) for x in operation.operands)

    def is_reduced(self, value: str) -> bool:
        """Whether reductions chose it."""
        operation = self.values.get(value)
        if operation is None or operation.name not in ("tt.reduce", "arith.select"):
            return False
        return operation.name == "tt.reduce" or all(map(self.is_reduced, operation.operands[1:]))

    def is_length_of_share(self, value: str) -> bool:
        """Whether it is a constant times a quotient by the number of shares."""
        operation = self.values.get(value)
        if operation is None or operation.name != "arith.muli":
            return False
        by_splits = [
            f
            for f in map(self.values.get, operation.operands)
            if f is not None and f.name == "arith.divsi" and self.is_argument(f.operands[1], "splits")
        ]
        return bool(by_splits) and any(self.constant(x) is not None for x in operation.operands)

    def counts_shares(self, value: str) -> bool:
        """Whether it is an index that reductions chose, divided by a constant."""
        operation = self.values.get(value)
        if operation is None or operation.name != "arith.divsi":
            return False
        return self.is_reduced(operation.operands[0]) and self.constant(operation.operands[1]) is not None

    def begins_share(self, value: str) -> bool:
        """Whether it is program_id(1) times something, or a share's number times its length; perhaps cut."""
        operation = self.values.get(value)
        if operation is None or operation.name not in ("arith.muli", "arith.minsi"):
            return False
        if operation.name == "arith.minsi":
            return any(map(self.begins_share, operation.operands))
        a, b = operation.operands
        if any(self.counts_shares(x) and self.is_length_of_share(y) for x, y in ((a, b), (b, a))):
            return True
        factors = [self.values.get(x) for x in operation.operands]
        return any(
            f is not None and f.name == "tt.get_program_id" and f.text.startswith("y ") for f in factors
        )

    def is_bounded_by_a_tile(self, value: str) -> bool:
        operation = self.values.get(value)
        if operation is None:
            return False
        if operation.name in ("tt.make_range", "arith.constant"):
            return True
        if operation.name == "arith.remsi":
            return self.constant(operation.operands[1]) is not None
        if operation.name == "tt.scan":
            return self.is_of_bits(operation.operands[0])
        if self.is_power_of_bits(value):
            return True
        # Of what is chosen from, the choice is no part.
        operands = operation.operands[operation.name == "arith.select" :]
        if operation.name == "arith.shrsi":
            return self.is_bounded_by_a_tile(operands[0])
        # The smaller of two is bounded where either is, and so are the bits that both have.
        some = any if operation.name in ("arith.minsi", "arith.andi") else all
        followed = operation.name in _FOLLOWED or operation.name == "arith.andi"
        return followed and some(map(self.is_bounded_by_a_tile, operands))

    def is_of_bits(self, value: str) -> bool:
        """Whether each number is 0 or 1."""
        operation = self.values.get(value)
        return operation is not None and operation.name == "arith.extui" and "xi1>" in operation.text

    def is_power_of_bits(self, value: str) -> bool:
        """Whether it is ``1 << bits``."""
        operation = self.values.get(value)
        if operation is None or operation.name != "arith.shli":
            return False
        return self.constant(operation.operands[0]) == 1 and self.is_argument(operation.operands[1], "bits")

    def is_place_in_lists(self, operation: _Operation) -> bool:
        """Whether a product or a shift is one of the three that address a row's lists."""
        a, b = operation.operands
        if operation.name == "arith.shli":
            tile = self.values.get(a)
            quotient = tile is not None and tile.name == "arith.divsi"
            counted = quotient and self.constant(tile.operands[1]) is not None
            return self.is_argument(b, "bits") and (counted or self.constant(a) == 1)
        for x, y in ((a, b), (b, a)):
            if self.is_argument(x, "capacity") and self.is_bounded_by_a_tile(y):
                return True
            tiles = self.values.get(y)
            if self.constant(x) is not None and tiles is not None and tiles.name == "arith.divsi":
                return self.is_power_of_bits(tiles.operands[1])
        return False

    def is_narrow_enough(self, value: str) -> bool:
        operation = self.values[value]
        if operation.name not in ("arith.muli", "arith.addi", "arith.shli") or not operation.narrow:
            return True
        a, b = operation.operands
        either_way = ((a, b), (b, a))
        if operation.name == "arith.addi":
            return any(
                self.is_bounded_by_a_tile(x)
                or self.begins_share(x)
                or (self.counts_tiles(x) and (self.counts_tiles(y) or self.is_quotient(y, 2)))
                for x, y in either_way
            )
        if self.is_place_in_lists(operation):
            return True
        if operation.name == "arith.muli" and self.begins_share(value):
            return True
        for x, y in either_way:
            number = self.constant(x)
            if number is not None:
                bounded = self.counts_tiles(y) or self.is_bounded_by_a_tile(y) or self.is_quotient(y, number)
                return operation.name == "arith.muli" and (abs(number) <= 1 or bounded)
        return False

    def followed(self) -> dict[str, _Operation]:
        """The operations that the kernel's addresses are computed by."""
        offsets = [o for o in self.values.values() if o.name == "tt.addptr"]
        waiting = [x for o in offsets for x in o.operands]
        seen: dict[str, _Operation] = {}
        while waiting:
            value = waiting.pop()
            operation = self.values.get(value)
            if operation is None or value in seen or operation.name not in {*_FOLLOWED, "loop"}:
                continue
            seen[value] = operation
            waiting.extend(operation.operands)
        return seen


def too_narrow(ttir: str) -> list[str]:
    """The 32-bit operations in addresses that large sizes would overflow; none is right."""
    addresses = _Addresses(ttir)
    return [
        f"{value} = {operation.name} {operation.text}"
        for value, operation in addresses.followed().items()
        if not addresses.is_narrow_enough(value)
    ]
