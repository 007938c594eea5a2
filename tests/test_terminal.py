"""Output that nobody reads, that a disk refuses, or that an encoding lacks characters for, and what the work makes of it."""

import contextlib
import io
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from phase8.errors import DataError, StorageError
from phase8.terminal import LastingStream, lasting_streams, make_console, output_is_the_product, run_door, tell

ROOT = Path(__file__).parents[1]
LOST = "standard output is lost (Broken pipe); going on without it\n"


@contextmanager
def output_to(descriptor):
    """Standard output goes there; in the test itself, for pytest sets it anew before that."""
    with open(descriptor, "w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
        yield


def without_reader():
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return output_to(writer)


def full_disk():
    return output_to("/dev/full")


def print_twice():
    print("first", flush=True)
    print("second", flush=True)
    return 0


def print_the_product():
    with output_is_the_product():
        return print_twice()


def test_work_goes_on_when_the_reader_of_its_output_has_gone(capfd):
    with without_reader():
        assert run_door(print_twice) == 0
    assert capfd.readouterr().err == LOST


def test_what_is_left_in_a_buffer_at_the_end_is_no_failure_either(capfd):
    with without_reader():
        assert run_door(lambda: print("buffered") or 0) == 0
    assert capfd.readouterr().err == LOST


def test_work_goes_on_when_the_disk_under_its_output_is_full(capfd):
    with full_disk():
        assert run_door(print_twice) == 0
    assert capfd.readouterr().err == "standard output is lost (No space left on device); going on without it\n"


def test_a_door_that_only_prints_ends_without_a_word_when_its_reader_has_gone(capfd):
    with without_reader():
        assert run_door(print_the_product) == 141
    assert capfd.readouterr().err == ""


def test_a_door_that_only_prints_says_that_its_disk_is_full(capfd):
    with full_disk():
        assert run_door(print_the_product) == StorageError.exit_code
    assert capfd.readouterr().err.startswith("error: cannot write standard output: No space left on device; ")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_console_does_not_end_the_work(capfd, is_terminal):
    """Rich would raise SystemExit."""
    with without_reader():
        console = make_console(force_terminal=is_terminal)
        for _ in range(2):
            console.print("a line")
    assert capfd.readouterr().err == LOST


def test_standard_error_that_nobody_reads_is_no_error():
    with without_reader(), contextlib.redirect_stderr(sys.stdout):
        assert run_door(lambda: (_ for _ in ()).throw(DataError("no data"))) == 3


def test_a_pipe_that_is_full_for_a_moment_loses_a_piece_only():
    class Full(io.StringIO):
        def write(self, text):
            if text == "a":
                raise BlockingIOError
            return super().write(text)

    below = Full()
    stream = LastingStream(below)
    stream.writelines("abc")
    assert (below.getvalue(), stream.is_lost) == ("bc", False)


@pytest.mark.parametrize("close", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_closed_from_the_start_are_silent_and_no_file_gets_their_number(close, tmp_path):
    program = (
        "import os, sys\n"
        "from phase8.terminal import run_door, tell\n"
        "def work():\n"
        "    with open(sys.argv[1], 'w') as file:\n"
        "        assert file.fileno() > 2\n"
        "        print('out', flush=True); print('err', file=sys.stderr); tell('told'); os.system('echo child; echo child >&2')\n"
        "    return 7\n"
        "sys.exit(run_door(work))\n"
    )
    command = f'"{sys.executable}" -c "$1" "$2" {close}'
    done = subprocess.run(["sh", "-c", command, "sh", program, tmp_path / "file"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 7 and (tmp_path / "file").read_text() == ""
    assert "out" not in close and b"Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_an_encoding_lacks_is_written_as_its_escape(monkeypatch, encoding):
    below = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(below, encoding=encoding, write_through=True))

    def work():
        print("日")
        make_console().print("runs\udcff")
        raise DataError("日\udcff is missing")

    assert run_door(work) == 3
    sun = "日" if encoding == "utf-8" else r"\u65e5"
    assert below.getvalue().decode(encoding).splitlines() == [sun, r"runs\udcff", rf"error: {sun}\udcff is missing"]


def test_what_is_told_past_the_buffers_never_fails(capfd):
    tell("runs\udcff\n")
    assert capfd.readouterr().err == "runs\\udcff\n"


def test_an_interrupted_door_says_so(capsys):
    assert run_door(lambda: (_ for _ in ()).throw(KeyboardInterrupt()), interrupted="go on") == 130
    assert capsys.readouterr().err == "go on\n"


def test_the_streams_are_given_back():
    before = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), lasting_streams():
        1 / 0  # noqa: B018
    assert (sys.stdout, sys.stderr) == before
