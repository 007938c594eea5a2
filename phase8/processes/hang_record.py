"""The hang record of a rank for debugging: its Python stacks and its last collectives."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path

import torch

from phase8.accelerator import records_collectives_of_nccl
from phase8.durable import replace_file
from phase8.terminal import ESCAPED


def write_hang_record(directory: Path, *, rank: int, device_type: str) -> None:
    """Writes `rank-N.stack.txt` and `rank-N.collectives.json` for rank N.

    The collectives come from torch's flight recorder, which keeps the number that TORCH_FR_BUFFER_SIZE gave when the process group was
    created. Its JSON form is used, because the other form is a pickle. Those of a recorded step (`train.cuda_graphs`) are not among them: nothing
    launches them.

    Args:
        directory: Directory of the records; it is created if missing.
        rank: Number of this rank.
        device_type: Type of the device, whose backend's collectives are recorded.
    """
    directory.mkdir(parents=True, exist_ok=True)
    frames = sys._current_frames()
    main = threading.main_thread().ident
    replace_file(directory / f"rank-{rank}.stack.txt", "".join(traceback.format_stack(frames[main])).encode(errors=ESCAPED))
    recorder = torch._C._distributed_c10d
    collectives = recorder._dump_nccl_trace_json() if records_collectives_of_nccl(device_type) else recorder._dump_fr_trace_json()
    replace_file(directory / f"rank-{rank}.collectives.json", collectives)
