"""What the banner says about implementations, and that the config's choice is made before anything is compiled."""

import pytest
import torch

from phase8.kernels.backends import SDPA, Backend
from phase8.train import build, run_facts
from phase8.train.engine import train_state
from phase8.train.run_facts import implementation_facts
from tests.train.tiny_run import prepare, tiny_config

CPU = torch.device("cpu")
TRITON = Backend("triton", "triton 3.7.1, ptxas 13.1 selected in place of ptxas 12.8")


@pytest.fixture
def lines(tiny, monkeypatch):
    def with_backend(backend, *overrides, hint=None):
        monkeypatch.setattr(run_facts, "kernel_backend", lambda device: backend)
        monkeypatch.setattr(run_facts, "apex_hint", lambda: hint)
        return dict(implementation_facts(tiny_config(tiny, *overrides), device=CPU))

    return with_backend


def test_kernels_and_assembler_are_named_for_mixer_and_loss(lines):
    found = lines(TRITON, "model.score=dot")
    assert list(found) == ["mixer", "loss", "optimizer"]
    assert (found["mixer"], found["loss"]) == (f"Triton (dot window, gated linear recurrence): {TRITON.reason}", f"Triton: {TRITON.reason}")


@pytest.mark.parametrize(("path", "words"), [("linear", ", gated linear recurrence"), ("delta", ", gated delta rule"), ("none", "")])
def test_the_recurrence_is_named(lines, path, words):
    found = lines(TRITON, "model.score=dot", "model.chain=none", f"model.global_path={path}")
    assert found["mixer"] == f"Triton (dot window{words}): {TRITON.reason}"


def test_references_are_named_with_the_reason(lines):
    found = lines(Backend("reference", "train.kernels is reference"))
    assert found["mixer"] == "plain torch references (lorentz window, gated linear recurrence): train.kernels is reference"
    assert found["loss"] == "plain torch references: train.kernels is reference"


@pytest.mark.parametrize(("compiled", "words"), [("false", ""), ("true", ", MKL in linear layers of compiled blocks")])
def test_the_library_that_multiplies_fp32_on_a_cpu_is_named(lines, monkeypatch, compiled, words):
    reference, settings = Backend("reference", "no GPU"), (f"train.compile.enabled={compiled}", "precision.dtype=fp32")
    monkeypatch.setattr(run_facts, "fp32_backend", lambda: Backend("oneDNN", "because"))
    assert lines(reference, *settings)["products of fp32"] == f"oneDNN{words} (because)"
    monkeypatch.setattr(run_facts, "fp32_backend", lambda: Backend("MKL", "because"))
    assert lines(reference, *settings)["products of fp32"] == "MKL (because)"
    assert "products of fp32" not in lines(reference, "precision.dtype=bf16") and "products of fp32" not in lines(TRITON, *settings)


def test_heads_too_wide_for_the_kernels_are_named(lines):
    assert "head size 258 is above 256" in lines(TRITON, "model.head_size=258")["mixer"]
    assert "head size" not in lines(TRITON, "model.head_size=256")["mixer"]
    assert "head size" not in lines(Backend("reference", "no GPU"), "model.head_size=258")["mixer"]


@pytest.mark.parametrize(("packed", "mask"), [("false", ""), ("true", ", with a document mask")])
def test_the_transformer_names_its_attention(packed, mask, lines, monkeypatch):
    asked = []

    def attention_backend(device, *, dtype, masked):
        asked.append((device, dtype, masked))
        return Backend(SDPA, "because")

    monkeypatch.setattr(run_facts, "attention_backend", attention_backend)
    found = lines(TRITON, "model.block=transformer", "precision.dtype=bf16", f"data.reset_at_document_boundaries={packed}")
    assert found["mixer"] == f"full causal attention{mask}: {SDPA} (because)" and found["loss"].startswith("Triton")
    assert asked == [(CPU, torch.bfloat16, packed == "true")]


def test_the_optimizer_is_named_and_an_installed_apex_mentioned(lines):
    adamw = lines(TRITON, "optim.learning_rate=3e-4", "optim.state_dtype=bf16")["optimizer"]
    assert adamw == "adamw, learning rate 0.0003, moments of matrices in bf16"
    assert lines(TRITON, hint="apex is not NVIDIA's")["optimizer"].endswith(", moments in fp32, torch's fused AdamW; apex is not NVIDIA's")
    muon = lines(TRITON, "optim.name=muon")["optimizer"]
    assert muon.startswith("muon on ") and " a step; adamw on all else, " in muon


@pytest.mark.parametrize("wanted", ["auto", "reference"])
def test_kernels_are_selected_once_and_before_anything_is_built_or_compiled(wanted, tiny, monkeypatch):
    events = []
    build_model = train_state.build_model
    monkeypatch.setattr(build, "select_kernels", lambda *arguments: events.append(arguments))
    monkeypatch.setattr(train_state, "build_model", lambda *a, **k: events.append("model") or build_model(*a, **k))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *a, **k: events.append("compile"))
    prepare(tiny, f"train.kernels={wanted}", "train.compile.enabled=true")
    assert events == [(wanted, CPU), "model", *["compile"] * 3]  # two blocks and the final norm
