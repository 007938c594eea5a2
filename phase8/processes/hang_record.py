"""What a rank leaves behind for whoever looks into a hang: where its Python code is, and its last collectives."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path

import torch

from phase8.durable import replace_file
from phase8.terminal import ESCAPED


def write_hang_record(directory: Path, *, rank: int, device_type: str) -> None:
    """Writes `rank-N.stack.txt` and `rank-N.collectives.json` for rank N.

    The collectives come from the flight recorder of torch, which keeps as many as TORCH_FR_BUFFER_SIZE said when the process group was
    made. It is the JSON form: the other one is a pickle.

    Args:
        directory: Made if it is not there.
        rank: Of this process.
        device_type: `cuda`: the collectives of NCCL, else those of gloo.
    """
    directory.mkdir(parents=True, exist_ok=True)
    frames = sys._current_frames()
    main = threading.main_thread().ident
    replace_file(directory / f"rank-{rank}.stack.txt", "".join(traceback.format_stack(frames[main])).encode(errors=ESCAPED))
    recorder = torch._C._distributed_c10d
    collectives = recorder._dump_nccl_trace_json() if device_type == "cuda" else recorder._dump_fr_trace_json()
    replace_file(directory / f"rank-{rank}.collectives.json", collectives)
