"""A file of TensorBoard events.

TensorBoard's own writer hands events to a thread, which ends with a traceback when the disk is full and makes every later call raise or
wait. Here an event reaches the operating system at once, whole or not at all, in the call that records it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from phase8.durable import append_whole
from phase8.observe.scalars import scalars_of

_VERSION = "brain.Event:2"


class EventFile:
    """An event file that is being written.

    Args:
        directory: Directory of the file; it is created if missing.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = FileIO(directory / name, "xb")
        self._records = RecordWriter(self)
        self._add(Event(file_version=_VERSION))

    def begin(self, resume_step: int) -> None:
        """Hides what was recorded of the steps after `resume_step`, in this file and in older ones of its directory; 0: of all.

        Raises:
            OSError: The file cannot be written.
        """
        self._add(Event(step=resume_step + 1 if resume_step > 0 else 0, session_log=SessionLog(status=SessionLog.START)))

    def log(self, record: Mapping[str, Any]) -> None:
        """Records the figures of a metrics line.

        Args:
            record: The line.

        Raises:
            OSError: The file cannot be written; it holds whole events only.
        """
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars_of(record).items()]
        if values:
            self._add(Event(step=record["step"], summary=Summary(value=values)))

    def write(self, record: bytes) -> None:
        """Appends an event that `RecordWriter` has encoded."""
        append_whole(self._file, record)

    def close(self) -> None:
        """Closes the file; there is no buffer to be written."""
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
