from __future__ import annotations

import contextlib
import io
import re
import threading

import pytest
from rich.console import Console

from phase8.observe.progress import Progress


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def terminal_console(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)


def last_drawn_line(console: Console) -> str:
    """What remains on the screen: the text after the last carriage return."""
    return console.file.getvalue().replace("\x1b[?25h", "").rstrip("\n").split("\r")[-1].replace("\x1b[2K", "").rstrip()


def steps_printed(console: Console) -> list[int]:
    return [int(step.replace(",", "")) for step in re.findall(r"^step +([\d,]+)/", console.file.getvalue(), flags=re.MULTILINE)]


def test_a_log_has_the_first_step_every_nth_and_the_last(make_step):
    console = plain_console()
    with Progress(total_steps=23, start_step=0, log_every_n_steps=10, console=console) as progress:
        for step in range(1, 24):
            progress.step(make_step(step))
        progress.evaluation(23, 3.5)
    assert steps_printed(console) == [1, 10, 20, 23]
    assert console.file.getvalue().splitlines()[-1] == "step 23  validation loss 3.5000"


def test_an_interrupted_run_prints_the_step_it_ended_with(make_step):
    console = plain_console()
    with Progress(total_steps=100, start_step=30, log_every_n_steps=10, console=console) as progress:
        for step in range(31, 48):
            progress.step(make_step(step))
    assert steps_printed(console) == [31, 40, 47]


def test_a_plain_line_says_everything_and_is_not_wrapped(make_step):
    console = plain_console()
    with Progress(total_steps=5000, start_step=0, log_every_n_steps=1, console=console) as progress:
        progress.evaluation(0, 9.7)
        for step in (1, 2, 3):
            progress.step(make_step(step, loss=4.125, step_seconds=1.0))
    assert console.file.getvalue().splitlines()[-1] == (
        "step     3/5,000  loss 4.1250  val 9.7000  48.1k tok/s  MFU 41.2 %  3 GiB  grad 1.25  lr 3.00e-04  ETA 1 h 23 min"
    )


def test_a_skipped_step_and_an_unknown_mfu_show(make_step, make_skipped):
    console = plain_console()
    with Progress(total_steps=9, start_step=0, log_every_n_steps=1, console=console) as progress:
        progress.step(make_skipped(1))
        progress.step(make_step(2, mfu=None))
    first, second = console.file.getvalue().splitlines()
    assert "loss skipped" in first and "grad not finite" in first and "skipped 1" in first
    assert "MFU" not in second and "skipped 1" in second


def test_the_eta_ignores_compilation_and_waits_for_three_steps(make_step):
    console = plain_console()
    with Progress(total_steps=1000, start_step=0, log_every_n_steps=1, console=console) as progress:
        for step, seconds in enumerate([90.0, 1.0, 1.1, 0.9, 1.0], start=1):
            progress.step(make_step(step, step_seconds=seconds))
    lines = console.file.getvalue().splitlines()
    assert ["ETA" in line for line in lines] == [False, False, True, True, True]
    assert lines[-1].endswith("ETA 16 min 35 s")  # 995 steps of one second


def busy_step(make_step, step: int):
    """A step of 512 tokens; every tenth is held up by something else on the machine."""
    seconds = 5.2 if step % 10 == 0 else 0.2
    return make_step(step, step_seconds=seconds, tokens_per_second=512 / seconds, mfu=0.04 / seconds)


def test_speed_is_that_of_all_steps_since_the_line_before(make_step):
    console = plain_console()
    with Progress(total_steps=45, start_step=0, log_every_n_steps=20, console=console) as progress:
        for step in range(1, 46):
            progress.step(busy_step(make_step, step))
    shown = re.findall(r"(\S+) tok/s  MFU (\S+) %", console.file.getvalue())
    # Step 1; steps 2 to 20, two of them slow; 21 to 40, likewise; 41 to 45. The steps 20 and 40 themselves made 98 tok/s.
    assert shown == [("2.56k", "20.0"), ("705", "5.5"), ("731", "5.7"), ("2.56k", "20.0")]


def test_the_live_line_shows_the_speed_of_the_last_seconds(make_step):
    console = terminal_console(160)
    with Progress(total_steps=200, start_step=0, log_every_n_steps=1, console=console) as progress:
        for step in range(1, 101):
            seconds = {1: 60.0, 90: 5.1}.get(step, 0.2)
            progress.step(make_step(step, step_seconds=seconds, tokens_per_second=512 / seconds))
    # Steps 76 to 100 took 9.9 s.
    assert "  1.29k tok/s" in last_drawn_line(console)


def test_what_comes_between_steps_is_in_the_eta(make_step, monkeypatch):
    console, now = plain_console(), [0.0]
    monkeypatch.setattr("phase8.observe.progress.time.perf_counter", lambda: now[0])
    with Progress(total_steps=1100, start_step=0, log_every_n_steps=100, console=console) as progress:
        for step in range(1, 101):
            now[0] += 1.0 + (10.0 if step % 10 == 0 else 0.0)
            progress.step(make_step(step, step_seconds=1.0))
    assert console.file.getvalue().rstrip().endswith("ETA 31 min 40 s")  # 1000 steps, and 9 evaluations in 100 of them


def test_epochs_of_each_source_are_shown_and_leave_a_narrow_terminal_first(make_step):
    console = plain_console()
    epochs = {"web": 0.0}
    with Progress(total_steps=2, start_step=0, log_every_n_steps=1, console=console, epochs=lambda: epochs) as progress:
        progress.step(make_step(1))
        epochs.update(web=0.314, code=2.04)
        progress.step(make_step(2))
    first, second = console.file.getvalue().splitlines()
    assert first.endswith("lr 3.00e-04  epoch 0.00") and second.endswith("lr 3.00e-04  epochs web 0.31, code 2.04")
    for width, is_shown in ((80, False), (160, True)):
        console = terminal_console(width)
        with Progress(total_steps=2, start_step=0, log_every_n_steps=1, console=console, epochs=lambda: epochs) as progress:
            progress.step(make_step(1))
        assert ("code 2.04" in last_drawn_line(console)) == is_shown


def test_evaluations_and_messages_are_printed_as_they_are(make_step):
    console = plain_console()
    with Progress(total_steps=2000, start_step=0, log_every_n_steps=10, console=console) as progress:
        progress.evaluation(1000, 3.25)
        progress.message("saved [runs/x] " + "long " * 30)
    assert console.file.getvalue() == "step 1,000  validation loss 3.2500\nsaved [runs/x] " + "long " * 30 + "\n"


def test_a_terminal_shows_one_line_with_a_bar_and_messages_above_it(make_step):
    console = terminal_console(160)
    with Progress(total_steps=40, start_step=0, log_every_n_steps=1, console=console) as progress:
        for step in range(1, 21):
            progress.step(make_step(step, loss=4.125))
        progress.message("saved step 20")
    line = last_drawn_line(console)
    assert line.startswith("20/40 ━━━")
    assert line.endswith("loss 4.1250  48.1k tok/s  MFU 41.2 %  3 GiB  grad 1.25  lr 3.00e-04  ETA 3.4 s")
    assert "saved step 20\n" in console.file.getvalue()


@pytest.mark.parametrize("width", [24, 40, 60, 80, 100, 120, 200])
def test_the_line_fits_any_terminal_and_drops_the_least_important_first(make_step, width):
    console = terminal_console(width)
    with Progress(total_steps=4000, start_step=0, log_every_n_steps=1, console=console) as progress:
        for step in range(1, 11):
            progress.step(make_step(step, loss=4.125))
    line = last_drawn_line(console)
    names = ["loss", "ETA", "tok/s", "MFU", "GiB", "grad", "lr"]
    shown = [name in line for name in names]
    assert "\n" not in line and len(line) <= width
    assert shown == sorted(shown, reverse=True)
    assert sum(shown) == {24: 0, 40: 1, 60: 3, 80: 5, 100: 6, 120: 7, 200: 7}[width]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_line_that_cannot_be_shown_at_the_end_hides_no_error_and_makes_none(make_step, is_terminal, capfd):
    class Failing(io.StringIO):
        fails = False

        def write(self, text):
            if self.fails:
                raise OSError(5, "the terminal is gone")
            return super().write(text)

    for error in (None, KeyError("an earlier one")):
        console = Console(file=Failing(), force_terminal=is_terminal, width=80)
        with contextlib.suppress(KeyError), Progress(total_steps=4, start_step=0, log_every_n_steps=4, console=console) as progress:
            progress.step(make_step(1))
            progress.step(make_step(2))
            console.file.fails = True
            if error is not None:
                raise error
        assert capfd.readouterr().err == "the last line of progress is lost: OSError: [Errno 5] the terminal is gone\n"


def test_no_thread_redraws_the_line(make_step):
    before = threading.active_count()
    with Progress(total_steps=4, start_step=0, log_every_n_steps=1, console=terminal_console(100)) as progress:
        progress.step(make_step(1))
        assert threading.active_count() == before
