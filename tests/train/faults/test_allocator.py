"""A run says once that the allocator had to flush its cache, and not for the first steps, in which memory finds its place."""

import io

import pytest
import torch
from rich.console import Console

from phase8 import accelerator
from phase8.train.build import build_run
from phase8.train.faults.allocator import FullMemory
from phase8.train.loop import train
from tests.train.faults.step_metrics import step_metrics
from tests.train.tiny_run import records, tiny_config


def numbers(monkeypatch, *flushes):
    """Lets torch report these numbers, one after the other."""
    reported = iter(flushes)
    monkeypatch.setattr(accelerator, "num_cache_flushes", lambda device: next(reported))


def test_it_is_said_once_and_of_later_steps_alone(monkeypatch):
    numbers(monkeypatch, 2, 5, 5, 9, 30)
    memory = FullMemory(torch.device("cpu"), num_slow_steps=1)
    said = [memory.after_step(step_metrics(step)) for step in (1, 2, 3, 4)]
    assert [sentence is not None for sentence in said] == [False, False, True, False]
    assert said[2].startswith("step 3: the memory of the device is nearly full") and "4 times since the step before" in said[2]
    assert "train.micro_batch_size" in said[2] and "expandable_segments" in said[2]


def test_a_device_that_does_not_say_is_never_full(monkeypatch):
    numbers(monkeypatch, None, None, None)
    memory = FullMemory(torch.device("cpu"), num_slow_steps=0)
    assert memory.after_step(step_metrics(1)) is None and memory.after_step(step_metrics(2)) is None


def test_a_run_records_and_shows_it(tiny, monkeypatch):
    numbers(monkeypatch, *[0] * 4, *[3] * 17)  # before the run, and after each step; the first three of a process are slow
    shown = io.StringIO()
    run = build_run(tiny_config(tiny), device=torch.device("cpu"), resume="none", console=Console(file=shown, width=400))
    train(run, resume_command="")
    (event,) = [record for record in records(run) if record.get("event") == "full_memory"]
    assert event["step"] == 4 and event["message"] in shown.getvalue()


@pytest.mark.gpu
def test_torch_reports_flushes():
    device = torch.device("cuda", torch.cuda.current_device())
    before = accelerator.num_cache_flushes(device)
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.empty(int(0.6 * free), dtype=torch.uint8, device=device)
    del kept  # torch keeps its memory, which is too small for the next one
    other = torch.empty(int(0.7 * free), dtype=torch.uint8, device=device)
    assert accelerator.num_cache_flushes(device) == before + 1
    del other
    torch.cuda.empty_cache()
