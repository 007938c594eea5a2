"""How programs divide a product of several tokens: what to edit when a GPU has been measured.

`tools/bench/decoding_product.py --tiles` times the candidates of each shape, the most promising first. An estimate from bytes tells which they are:
a weight is read once, each block of rows reads the tokens again, and programs of the same rows leave sums for the last of them.
"""

from dataclasses import dataclass, replace
from functools import cache

BYTES = 2  # of a number of weight and tokens
BYTES_OF_SUM = 4
LEAST_ROWS = 64  # of a matrix instruction of Hopper
LEAST_TOKENS = 16  # of a tile of tokens

# Bytes in a microsecond on an H200: from memory, from the L2 cache to all processors, and to one of them. Their ratios decide, not their size.
MEMORY_RATE, CACHE_RATE, PROCESSOR_RATE = 4.2e6, 5.5e6, 80e3
FIRST_BYTES = 1.5  # microseconds until the first tile of a program has arrived, and until the last program of some rows knows that it is the last

MOST_SPLITS = 8
MOST_CANDIDATES = 10
SPLITS_OF_A_TILE = 3  # candidates that differ in splits alone
OTHER_BYTES_AHEAD = (0, 128 * 1024)  # for the most promising candidate


@dataclass(frozen=True)
class Device:
    """What a tile depends on.

    Args:
        num_processors: Processors of the device.
        shared_bytes: Shared memory that a program may have.
    """

    num_processors: int
    shared_bytes: int


@dataclass(frozen=True)
class Shape:
    """A product.

    Args:
        tokens: Tokens, as many as a tile has.
        width: Width of the input.
        rows: Rows of the weight.
        is_gated: Whether the first half of the outputs gates the second.
    """

    tokens: int
    width: int
    rows: int
    is_gated: bool


@dataclass(frozen=True)
class Tile:
    """The part of a product that a program has.

    Args:
        rows: Rows of the weight; half of them are of the gate and half of what it gates.
        inputs: Inputs that are multiplied at once.
        num_warps: Warps of a program.
        num_stages: Tiles of inputs that are on their way or in use.
        splits: Programs that share the width.
        ahead: Bytes of its weight that are on their way to the L2 cache before the kernel in front has ended.
    """

    rows: int
    inputs: int
    num_warps: int
    num_stages: int
    splits: int = 1
    ahead: int = 64 * 1024

    def __str__(self) -> str:
        return f"f{self.rows} d{self.inputs} w{self.num_warps} s{self.num_stages} n{self.splits} a{self.ahead // 1024}"

    def shared_bytes(self, tokens: int) -> int:
        """Shared memory of a program."""
        return self.num_stages * (self.rows + tokens) * self.inputs * BYTES


# Those of 96 KiB leave room for programs of the next kernel before their own have ended.
TILES = (
    Tile(128, 64, num_warps=4, num_stages=4),
    Tile(64, 64, num_warps=4, num_stages=6),
    Tile(256, 64, num_warps=8, num_stages=4),
    Tile(128, 64, num_warps=8, num_stages=4),
)

# What a measurement has chosen instead of the first candidate.
MEASURED: dict[Shape, Tile] = {}


@cache
def tile_for(shape: Shape, device: Device) -> Tile:
    """The tile for a product on a device."""
    return MEASURED.get(shape) or candidates(shape, device)[0]


def candidates(shape: Shape, device: Device) -> list[Tile]:
    """Tiles that are worth a measurement, the most promising first; of each of `TILES` a few, which divide the width differently."""
    found: list[Tile] = []
    for tile in TILES:
        if tile.rows >= LEAST_ROWS * (2 if shape.is_gated else 1) and tile.shared_bytes(shape.tokens) <= device.shared_bytes:
            steps = -(-shape.width // tile.inputs)
            divided = [replace(tile, splits=splits) for splits in range(1, min(MOST_SPLITS, steps) + 1)]
            found += sorted(divided, key=lambda each: estimate(each, shape, device))[:SPLITS_OF_A_TILE]
    best, *others = sorted(found, key=lambda each: estimate(each, shape, device))[:MOST_CANDIDATES]
    return [best, *others, *(replace(best, ahead=ahead) for ahead in OTHER_BYTES_AHEAD)]


def estimate(tile: Tile, shape: Shape, device: Device) -> float:
    """Microseconds, from bytes alone."""
    programs = -(-shape.rows // tile.rows) * tile.splits
    steps = -(-shape.width // tile.inputs)
    inputs = -(-steps // tile.splits) * tile.inputs
    sums = 0 if tile.splits == 1 else tile.rows * shape.tokens * BYTES_OF_SUM
    moved = inputs * (tile.rows + shape.tokens) * BYTES + sums
    busiest = -(-programs // device.num_processors) * moved
    stream = max(shape.rows * shape.width * BYTES / MEMORY_RATE, programs * moved / CACHE_RATE, busiest / PROCESSOR_RATE)
    at_once = device.num_processors * max(device.shared_bytes // tile.shared_bytes(shape.tokens), 1)
    last = FIRST_BYTES + tile.splits * sums / PROCESSOR_RATE if tile.splits > 1 else 0.0
    return FIRST_BYTES * -(-programs // at_once) + stream + last
