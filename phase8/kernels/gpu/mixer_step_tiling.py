"""How the programs of a decoding step divide the state of its heads: what to edit when a GPU has been measured.

`tools/bench/mixer_step.py --tilings` times all candidates. A thread of a processor with n programs of w warps has 65,536 / (32 n w) registers, and a
candidate that does not get along with its registers is none: tests/kernels/test_mixer_step_gpu.py looks at the machine code of each.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """How the state of a head is divided.

    Args:
        is_whole: One program has both paths of a head; False: each has a part of the window, or some columns of the memory, and the last one merges.
        slots: Slots of a tile of keys or values; one tile is on its way while another is computed.
        num_warps: Warps of a program.
        max_registers: Registers of a thread at most.
        gate_tile: Inputs of a gate per channel that are in registers at a time.
        columns: Columns of the memory of a program, where programs are not whole.
        num_programs: Programs that the windows of all heads are divided over, as far as each has `part_tiles` tiles; where they are not whole.
        part_tiles: The fewest tiles of a window that are worth a program of their own.
    """

    is_whole: bool = False
    slots: int = 16
    num_warps: int = 4
    max_registers: int = 128
    gate_tile: int = 128
    columns: int = 32
    num_programs: int = 1024
    part_tiles: int = 2

    def __str__(self) -> str:
        shared = f"s{self.slots} w{self.num_warps} r{self.max_registers}"
        return f"whole {shared}" if self.is_whole else f"c{self.columns} {shared} n{self.num_programs} t{self.part_tiles}"

    def window_parts(self, num_heads: int, window: int) -> int:
        """Number of programs that share the window of each of so many heads, of all sequences together; 0 without a window."""
        if self.is_whole or window == 0:
            return min(window, 1)
        wanted = -(-self.num_programs // num_heads)
        return max(1, min(wanted, window // (self.slots * self.part_tiles)))


SPLIT = Tiling(num_programs=256)
WHOLE = Tiling(is_whole=True, slots=32, num_warps=4, max_registers=255, gate_tile=32)

# From how many heads of all sequences together on, for each processor, which tiling is taken; the first that fits.
CHOICES = ((0.9, WHOLE), (0.0, SPLIT))

# Left out since they spill: whole with 16 warps or with 64 slots, split with 96 registers, with 32 slots, or with 2 warps.
CANDIDATES = (
    WHOLE,
    Tiling(is_whole=True, slots=32, num_warps=8, gate_tile=32),
    SPLIT,
    Tiling(),
    Tiling(slots=32, columns=64, max_registers=168, part_tiles=1),
)


def tiling_for(num_heads: int, num_processors: int) -> Tiling:
    """The tiling for so many heads of all sequences together, on a device with so many processors."""
    return next(tiling for least, tiling in CHOICES if num_heads >= least * num_processors)
