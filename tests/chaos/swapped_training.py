"""launch/pretrain.py offloading to a disk, with something that happens in the middle of a step.

    python tests/chaos/swapped_training.py FAULT STEP LIBRARY ARGUMENTS-OF-PRETRAIN

FAULT is `killed`: the process is killed when it has written half of a file; `full`: the disk has no room left; or `none`. LIBRARY is what reads and
writes: `deepspeed`, which compiles for minutes and needs libaio, or `stand-in`.
"""

from __future__ import annotations

import errno
import importlib
import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from phase8.train.trainer import Trainer
from phase8.zero.deepspeed import import_deepspeed

ROOT = Path(__file__).parents[2]
FOUND = "on the disk at the start: "
WRITES_BEFORE = 3  # of a step, so that some of the files are of this step and others of the last


class StandIn:
    """DeepSpeed's `aio_handle` in Python, which reads and writes at once."""

    locked = frozenset()  # addresses; those of all handles

    def __init__(self, **_):
        self._begun = 0

    def async_pwrite(self, buffer, file, offset=0):
        descriptor = os.open(file, os.O_WRONLY)
        assert os.pwrite(descriptor, bytes_of(buffer), offset) == buffer.nbytes
        os.close(descriptor)
        self._begun += 1
        return 0

    def async_pread(self, buffer, file, offset=0):
        descriptor = os.open(file, os.O_RDONLY)
        assert os.preadv(descriptor, [bytes_of(buffer)], offset) == buffer.nbytes
        os.close(descriptor)
        self._begun += 1
        return 0

    def wait(self):
        done, self._begun = self._begun, 0
        return done

    def new_cpu_locked_tensor(self, num_elements, example):
        tensor = torch.empty(num_elements, dtype=example.dtype)
        StandIn.locked |= {tensor.untyped_storage().data_ptr()}
        return tensor

    def free_cpu_locked_tensor(self, tensor):
        StandIn.locked -= {tensor.untyped_storage().data_ptr()}
        return True

    def is_pinned(self, buffer):
        return buffer.untyped_storage().data_ptr() in self.locked


def bytes_of(buffer):
    return memoryview(buffer.detach().view(torch.uint8).numpy())


class Failing:
    """What comes before either library: in one step, the write after some others does not end."""

    fault, step, is_in_step, writes, reserve = "none", 0, False, 0, os.posix_fallocate

    def async_pwrite(self, buffer, file, offset=0):
        if Failing.fault == "killed" and Failing.is_due():
            descriptor = os.open(file, os.O_WRONLY)
            os.pwrite(descriptor, bytes(bytes_of(buffer)[: buffer.nbytes // 2]), offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().async_pwrite(buffer, file, offset)

    @staticmethod
    def is_due():
        Failing.writes += Failing.is_in_step
        return Failing.writes > WRITES_BEFORE


def reserve(descriptor, offset, length):
    if Failing.fault == "full" and Failing.is_due():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    Failing.reserve(descriptor, offset, length)


def take_step(trainer, *arguments, **options):
    Failing.is_in_step = trainer.run.position.step + 1 == Failing.step
    return original_step(trainer, *arguments, **options)


def put_before(library, disk):
    """Makes DeepSpeed find the class above, and prints which files lie on the disk before the first is written."""
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder
    original, standing_in, has_told = builder.load, SimpleNamespace(aio_handle=StandIn), False

    def load(self, verbose=False):
        nonlocal has_told
        operations = standing_in if library == "stand-in" else original(self, verbose=verbose)
        if not issubclass(operations.aio_handle, Failing):  # phase8 looks whether there is a library
            operations.aio_handle = type("FailingHandle", (Failing, operations.aio_handle), {})
        elif not has_told:  # DeepSpeed is about to use it
            print(f"{FOUND}{sorted(path.name for path in disk.rglob('*') if path.is_file())}", flush=True)
            has_told = True
        return operations

    builder.load = load
    if library == "stand-in":
        builder.is_compatible = lambda self, verbose=False: True


if __name__ == "__main__":
    Failing.fault, step, library, *rest = sys.argv[1:]
    Failing.step = int(step)
    (disk,) = (word.removeprefix("zero.nvme_path=") for word in rest if word.startswith("zero.nvme_path="))
    original_step, Trainer._take_step, os.posix_fallocate = Trainer._take_step, take_step, reserve
    os.environ["DS_ACCELERATOR"] = "cpu"
    import_deepspeed()
    put_before(library, Path(disk))
    sys.argv = [str(ROOT / "launch" / "pretrain.py"), *rest]
    runpy.run_path(sys.argv[0], run_name="__main__")
