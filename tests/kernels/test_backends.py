"""Which implementation runs, and why: decided without a GPU, so torch's answers about it are replaced."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from phase8.kernels import backends
from phase8.kernels.backends import (
    SDPA,
    apex_hint,
    attention_backend,
    choose_flash_attention,
    fp32_backend,
    installed_flash_attention,
    kernel_backend,
    prefers_onednn,
    select_kernels,
    uses_triton,
)
from phase8.kernels.toolchain import Toolchain

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ON_GPU = SimpleNamespace(is_cuda=True, device=GPU)


@pytest.fixture(autouse=True)
def _own_selection(monkeypatch):
    """What a test selects ends with it."""
    monkeypatch.setattr(backends, "_selection", backends._Selection())
    backends._gpu_backend.cache_clear()
    yield
    backends._gpu_backend.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose capability and toolchain a test sets; counts how often the toolchain is prepared."""
    machine = SimpleNamespace(capability=(9, 0), toolchain=Toolchain(True, None, "triton 3.9.0, ptxas 13.4"), prepared=0)

    def prepare(capability):
        assert capability == machine.capability
        machine.prepared += 1
        return machine.toolchain

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: machine.capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends, "prepare_toolchain", prepare)
    monkeypatch.setattr(backends, "installed_flash_attention", dict)
    return machine


def test_the_cpu_has_no_triton_kernels_and_never_imports_triton():
    select_kernels("auto", CPU)
    assert kernel_backend(CPU).name == "reference" and "need a GPU" in kernel_backend(CPU).reason
    assert not uses_triton(torch.zeros(1))
    code = (
        "import sys, torch\n"
        "from phase8.kernels.backends import select_kernels, uses_triton\n"
        "select_kernels('auto', torch.device('cpu'))\n"
        "assert not uses_triton(torch.zeros(1)) and 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("capability", "usable", "name", "words"),
    [
        ((9, 0), True, "triton", "ptxas 13.4"),
        ((9, 0), False, "reference", "ptxas 12.8, which miscompiles"),
        ((8, 0), True, "triton", "ptxas 13.4"),
        ((10, 0), True, "triton", "ptxas 13.4"),
        ((7, 5), True, "reference", "capability 7.5 is below 8.0"),
    ],
)
def test_on_a_gpu_capability_and_toolchain_decide(capability, usable, name, words, gpu):
    gpu.capability = capability
    if not usable:
        gpu.toolchain = Toolchain(False, None, "ptxas 12.8, which miscompiles")
    assert kernel_backend(GPU).name == name and words in kernel_backend(GPU).reason
    assert uses_triton(ON_GPU) == (name == "triton")


def test_not_on_amd(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert kernel_backend(GPU).name == "reference" and "NVIDIA" in kernel_backend(GPU).reason and gpu.prepared == 0


def test_the_toolchain_is_prepared_when_the_kernels_are_selected_and_only_once(gpu):
    select_kernels("auto", GPU)
    assert gpu.prepared == 1
    assert all(uses_triton(ON_GPU) for _ in range(3)) and gpu.prepared == 1


def test_the_references_can_be_asked_for_and_left_again(gpu):
    select_kernels("reference", GPU)
    assert gpu.prepared == 1  # torch.compile assembles too
    assert not uses_triton(ON_GPU) and kernel_backend(GPU).reason == "train.kernels is reference (triton 3.9.0, ptxas 13.4)"
    select_kernels("auto", GPU)
    assert uses_triton(ON_GPU)


FLASH_ATTENTION = {  # capability, installed generations -> the one that runs
    "Hopper prefers 3": ((9, 0), (2, 3, 4), 3),
    "Hopper takes 4": ((9, 0), (2, 4), 4),
    "Blackwell takes 4": ((10, 0), (2, 3, 4), 4),
    "Ampere has neither": ((8, 0), (2, 3, 4), None),
    "nothing installed": ((9, 0), (), None),
}


@pytest.mark.parametrize("case", FLASH_ATTENTION)
def test_which_flash_attention_fits(case):
    capability, generations, chosen = FLASH_ATTENTION[case]
    assert choose_flash_attention(capability, {generation: "1.0" for generation in generations}) == chosen


@pytest.fixture
def registry(monkeypatch):
    """Torch's switch between implementations of flash attention, recording."""
    calls = []
    switch = {
        "activate_flash_attention_impl": lambda name: calls.append(name),
        "restore_flash_attention_impl": lambda: calls.append("restored"),
        "current_flash_attention_impl": lambda: None if not calls or calls[-1] == "restored" else calls[-1],
        "list_flash_attention_impls": lambda: ["FA3", "FA4"],
    }
    for name, function in switch.items():
        monkeypatch.setattr(nn.attention, name, function, raising=False)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: calls.append(f"cudnn {enabled}"))
    return calls


def test_an_installed_flash_attention_is_put_behind_torch_and_taken_away_again(gpu, monkeypatch, registry):
    monkeypatch.setattr(backends, "installed_flash_attention", lambda: {3: "3.0.1"})
    select_kernels("auto", GPU)
    assert registry == ["FA3", "cudnn False"]
    assert attention_backend(GPU, dtype=torch.bfloat16, masked=False).name == f"flash-attn 3.0.1 through {SDPA}"
    for dtype, masked, words in ((torch.float32, False, "bf16 and fp16 only"), (torch.bfloat16, True, "no document mask")):
        backend = attention_backend(GPU, dtype=dtype, masked=masked)
        assert backend.name == SDPA and words in backend.reason
    assert attention_backend(CPU, dtype=torch.bfloat16, masked=False).name == SDPA
    select_kernels("reference", GPU)
    assert registry[2:] == ["restored", "cudnn True"]
    assert attention_backend(GPU, dtype=torch.bfloat16, masked=False) == backends.Backend(SDPA, "train.kernels is reference")


def test_a_flash_attention_that_cannot_be_loaded_is_named_and_not_used(gpu, monkeypatch, registry):
    def fail(name):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(backends, "installed_flash_attention", lambda: {3: "3.0.1"})
    monkeypatch.setattr(nn.attention, "activate_flash_attention_impl", fail)
    select_kernels("auto", GPU)
    backend = attention_backend(GPU, dtype=torch.bfloat16, masked=False)
    assert backend.name == SDPA and "flash-attn 3.0.1 is installed but cannot be loaded (undefined symbol)" in backend.reason


@pytest.mark.parametrize(("packages", "words"), [({2: "2.8.3"}, "kernels of the installed flash-attn 2.8.3"), ({}, "no newer flash-attn")])
def test_without_a_newer_one_torch_has_the_reason(packages, words, gpu, monkeypatch, registry):
    monkeypatch.setattr(backends, "installed_flash_attention", lambda: packages)
    select_kernels("auto", GPU)
    backend = attention_backend(GPU, dtype=torch.bfloat16, masked=False)
    assert backend.name == SDPA and words in backend.reason and registry == []


def install(folder, monkeypatch, *packages, **distributions):
    """Packages (files) and distributions (name=version) on the path, as pip leaves them."""
    for package in packages:
        (folder / package).parent.mkdir(parents=True, exist_ok=True)
        (folder / package).write_text("raise AssertionError('imported')")
    for name, version in distributions.items():
        metadata = folder / f"{name}-{version}.dist-info/METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)


def test_installed_generations_are_found_without_importing_them(tmp_path, monkeypatch, registry):
    versions = {"flash_attn": "2.8.3", "flash_attn_3": "3.0.0", "flash_attn_4": "4.0.0b36"}
    install(tmp_path, monkeypatch, "flash_attn/__init__.py", "flash_attn_interface.py", **versions)
    assert installed_flash_attention() == {2: "2.8.3", 3: "3.0.0", 4: "4.0.0b36"}
    monkeypatch.setattr(nn.attention, "list_flash_attention_impls", lambda: ["FA4"])
    assert installed_flash_attention() == {2: "2.8.3", 4: "4.0.0b36"}
    monkeypatch.delattr(nn.attention, "list_flash_attention_impls")
    assert installed_flash_attention() == {2: "2.8.3"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["apex/__init__.py", "apex/optimizers/__init__.py"], "NVIDIA apex is installed and not used"),
        (["apex/__init__.py", "apex/lib/libapex.py"], "not NVIDIA's"),
        (["apex.py"], "not NVIDIA's"),
    ],
)
def test_both_packages_called_apex_are_recognised_without_importing_them(files, words, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, *files)
    assert words in apex_hint()


def test_no_apex_no_hint():
    assert apex_hint() is None


@pytest.mark.parametrize(
    ("libraries", "capability", "processor", "expected"),
    [
        (("mkl", "mkldnn"), "AVX512", "vendor_id : AuthenticAMD", ("oneDNN", "MKL leaves half of AVX-512 idle")),
        (("mkl", "mkldnn"), "AVX512", "vendor_id : GenuineIntel", ("MKL", "the processor is its maker's")),
        (("mkl", "mkldnn"), "AVX2", "vendor_id : AuthenticAMD", ("MKL", "torch uses AVX2 of this processor")),
        (("mkl",), "AVX512", "vendor_id : AuthenticAMD", ("MKL", "this torch has no oneDNN")),
        (("mkldnn",), "AVX512", "vendor_id : AuthenticAMD", ("torch's own library", "this torch has no MKL")),
    ],
)
def test_onednn_multiplies_where_mkl_leaves_vector_units_idle(monkeypatch, libraries, capability, processor, expected):
    for name in ("mkl", "mkldnn"):
        monkeypatch.setattr(getattr(torch.backends, name), "is_available", lambda name=name: name in libraries)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(backends, "_processor", lambda: processor)
    monkeypatch.setattr(backends, "fp32_backend", fp32_backend.__wrapped__)  # it remembers what it has found
    name, reason = expected
    assert fp32_backend.__wrapped__().name == name and fp32_backend.__wrapped__().reason.startswith(reason)
    assert prefers_onednn() is (name == "oneDNN")
