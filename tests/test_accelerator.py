"""Types of devices: what is asked of torch for each, and what is answered where torch has nothing."""

import argparse
import re
from pathlib import Path

import pytest
import torch

from phase8 import accelerator
from phase8.config.arguments import add_device_option
from phase8.errors import ConfigError
from phase8.kernels.backends import Backend, kernel_backend
from phase8.train.device import device_type, host_settings, select_device, this_device
from tests.train.tiny_run import tiny_config

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda", 1)
CAPABILITIES = ("has_kernels", "records_steps", "multiplies_fp8", "reaches_peers", "locks_pages")


@pytest.mark.parametrize(
    ("name", "found", "there"),
    [("xpu", None, "cpu only"), ("cuda", None, "cpu only"), ("mps", "cuda", "cpu and cuda"), ("cuda:1", "xpu", "cpu and xpu")],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(monkeypatch, name, found, there):
    monkeypatch.setattr(accelerator, "present", lambda: found)
    with pytest.raises(ConfigError, match=f"--device is {name}, but torch finds {there} on this machine; use --device {found or 'cpu'}, or install"):
        select_device(name)


def test_the_number_of_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(accelerator, "present", lambda: "cuda")
    for name in ("cuda:1", "cpu:0"):
        sentence = f"--device is {name}, but a type without a number is needed, since each process takes the device of its place; use {name[:-2]}."
        with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
            select_device(name)


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [("auto", None, "cpu"), ("auto", "cuda", "cuda"), ("auto", "xpu", "cpu"), ("xpu", "xpu", "xpu"), ("cpu", "cuda", "cpu")],
)
def test_auto_takes_a_gpu_that_has_kernels_and_others_are_named(monkeypatch, name, found, expected):
    monkeypatch.setattr(accelerator, "present", lambda: found)
    assert device_type(name) == expected


def test_every_command_line_takes_any_name_of_a_device():
    parser = argparse.ArgumentParser()
    add_device_option(parser)
    assert parser.parse_args(["--device", "anything"]).device == "anything" and parser.parse_args([]).device == "auto"
    doors = [path for folder in ("launch", "tools") for path in (ROOT / folder).glob("*.py") if 'add_argument("--device"' in path.read_text("utf-8")]
    assert [path.name for path in doors] == ["benchmark_rank.py"]  # which another door starts; the rest use the option above


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_fast_paths_run_on_gpus_alone_and_the_document_says_what_others_do(capability):
    ask = vars(accelerator)[capability]
    assert ask("cuda") and not any(ask(name) for name in ("cpu", "xpu", "mps", "tpu", "neuron"))
    documents = (accelerator.__doc__, (ROOT / "docs/accelerators.md").read_text(encoding="utf-8"))
    assert all(re.search(rf"^\| `{capability}` \|", text, flags=re.MULTILINE) for text in documents)


def test_the_banner_says_why_another_accelerator_runs_references():
    assert kernel_backend(torch.device("xpu", 0)) == Backend("reference", "the Triton kernels are written for NVIDIA GPUs")


def test_backends_of_collectives_are_those_that_torch_names():
    assert accelerator.collectives("cpu") == "gloo"
    assert accelerator.collectives("cuda") == "cpu:gloo,cuda:nccl"
    assert accelerator.collectives("xpu") == "cpu:gloo,xpu:xccl"
    assert [accelerator.records_collectives_of_nccl(name) for name in ("cpu", "cuda", "xpu")] == [False, True, False]


@pytest.mark.parametrize(
    ("called", "name", "arguments"),
    [
        (lambda: accelerator.synchronize(GPU), "synchronize", (GPU,)),
        (lambda: accelerator.set_current(GPU), "set_device", (GPU,)),
        (lambda: accelerator.name_of(GPU), "get_device_name", (GPU,)),
        (lambda: accelerator.name_of("cuda"), "get_device_name", ()),
        (lambda: accelerator.compute_capability(GPU), "get_device_capability", (GPU,)),
        (lambda: accelerator.free_and_total_bytes(GPU), "mem_get_info", (GPU,)),
        (lambda: accelerator.peak_bytes(GPU), "max_memory_allocated", (GPU,)),
        (lambda: accelerator.reset_peak(GPU), "reset_peak_memory_stats", (GPU,)),
        (lambda: accelerator.generator_state(GPU), "get_rng_state", (GPU,)),
        (lambda: accelerator.set_generator_state(GPU, torch.empty(0)), "set_rng_state", (torch.empty(0), GPU)),
        (lambda: accelerator.count("cuda"), "device_count", ()),
        (lambda: accelerator.current_stream(GPU), "current_stream", (GPU,)),
        (lambda: accelerator.is_recording(), "is_current_stream_capturing", ()),
    ],
)
def test_on_a_gpu_the_answer_is_that_of_the_same_function_of_torch(monkeypatch, called, name, arguments):
    calls = []

    def answer(*given):
        calls.append(given)
        return torch.ones(())

    monkeypatch.setattr(torch.cuda, name, answer)
    called()
    assert len(calls) == 1 and str(calls[0]) == str(arguments)


def test_each_process_takes_the_gpu_of_its_place(monkeypatch):
    taken = []
    monkeypatch.setattr(accelerator, "present", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: taken[-1].index if taken else 0)
    assert select_device("auto", local_rank=2) == torch.device("cuda", 2)
    assert select_device("auto", local_rank=7) == torch.device("cuda", 2) and len(taken) == 1  # which the rendezvous refuses


def test_an_accelerator_without_wide_floats_is_refused():
    with pytest.raises(ConfigError, match=r"--device is mps, which has no float64 \(.+\), but sums of losses .+ use --device cpu"):
        accelerator._require_wide_floats(torch.device("mps"))  # which this build of torch has no tensors for at all


def test_memory_of_an_accelerator_that_torch_does_not_know_limits_no_plan(tiny, monkeypatch):
    monkeypatch.setattr(accelerator, "free_and_total_bytes", lambda device: None)
    monkeypatch.setattr(accelerator, "name_of", str)
    facts = this_device(torch.device("xpu", 0), tiny_config(tiny))
    assert (facts.type, facts.name, facts.can_compile, facts.is_limited) == ("xpu", "xpu:0", False, False)
    monkeypatch.setattr(accelerator, "free_and_total_bytes", lambda device: (1 << 30, 2 << 30))
    assert this_device(torch.device("xpu", 0), tiny_config(tiny)).is_limited
    assert host_settings(tiny_config(tiny), "xpu")["data.pin_memory"] is False


class UnjoinedRecording:
    """What torch's context of a recording does where work on another stream was not waited for."""

    def __init__(self, graph, **options):
        pass

    def __enter__(self):
        torch.cuda.set_stream("that of the recording")

    def __exit__(self, *error):
        raise RuntimeError("CUDA error: capturing stream has unjoined work")


def test_an_error_in_a_recording_is_raised_as_it_is(monkeypatch):
    """Else a run that is out of memory would end without the sentence that says so."""
    streams = ["the usual one"]
    monkeypatch.setattr(torch.cuda, "graph", UnjoinedRecording)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    with pytest.raises(torch.OutOfMemoryError, match="too little"), accelerator.recording(None):
        raise torch.OutOfMemoryError("too little")
    assert streams == ["the usual one", "that of the recording", "the usual one"]
    with pytest.raises(RuntimeError, match="unjoined"), accelerator.recording(None):
        pass


@pytest.mark.gpu
def test_page_locked_memory_goes_back_to_the_host_with_that_of_a_gpu():
    """Else a trial of offloaded settings would leave no room on the host for the run itself."""

    def held():
        return torch.cuda.host_memory_stats()["allocated_bytes.current"]

    accelerator.give_back_memory("cuda")
    before, offloaded = held(), torch.ones(1 << 24).to("cuda").to("cpu", non_blocking=True)
    torch.cuda.synchronize()
    assert held() - before >= offloaded.nbytes
    del offloaded
    accelerator.give_back_memory("cuda")
    assert held() == before


def test_page_locked_memory_is_given_back_where_torch_locks_pages(monkeypatch):
    given_back = []
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: given_back.append("pages"), raising=False)  # torch 2.12 and later
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append("device"))
    accelerator.give_back_memory("cuda")
    accelerator.give_back_memory("cpu")
    assert given_back == ["device", "pages"]


@pytest.mark.gpu
def test_an_error_in_a_recording_on_a_gpu_is_raised_as_it_is():
    stream, x = torch.cuda.Stream(), torch.zeros(4, device="cuda")
    before = torch.cuda.current_stream()
    with pytest.raises(torch.OutOfMemoryError, match="too little"), accelerator.recording(accelerator.Graph()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            x.add_(1)
        raise torch.OutOfMemoryError("too little")
    assert torch.cuda.current_stream() == before and x.add(2).sum().item() == 8
    graph = accelerator.Graph()
    with accelerator.recording(graph):
        x.add_(1)
    graph.replay()
    assert x.sum().item() == 4
