"""Inputs of recomputed blocks in host memory: no bit of a result changes, and the device keeps two of them. On a CPU the copies are plain ones."""

import weakref

import pytest
import torch

from phase8.config.model_section import ModelSection
from phase8.model import host_copies
from phase8.model.block import Block
from phase8.model.host_copies import HostCopies
from phase8.model.recomputation import apply_recomputation
from tests.model.small import document_starts, perturbed_model, random_tokens, scaled_down

MODES = {
    "full": {"mode": "full"},
    "full every two layers": {"mode": "full", "every_n_layers": 2},
    "slices": {"mode": "slices", "slice_tokens": 10},
    "one slice": {"mode": "slices", "slice_tokens": 100},
}


def recomputing_model(offload, *, mode, compiles=False, layers=4, dtype=torch.float32, embedding_scalars=False, **options):
    section = ModelSection(global_path="delta", chain="both", embedding_scalars=embedding_scalars)
    model = perturbed_model(scaled_down(section, num_layers=layers), dtype=dtype)
    apply_recomputation(model, mode, offload_inputs=offload, **options)
    for block in model.blocks.values() if compiles else ():
        block.compile(backend="aot_eager")
    return model


def forward(model, batch):
    tokens = random_tokens()[:batch]
    hidden, _ = model(tokens, document_starts(0, 7, 13)[:batch])
    return (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum()


@pytest.fixture
def moves(monkeypatch):
    """What is copied, as (number of the copy, whether it leaves), in order."""
    made, numbers, move = [], {}, HostCopies._move

    def noted(self, copy, to, source):
        made.append((numbers.setdefault(copy, len(numbers)), to is copy.host))
        move(self, copy, to, source)

    monkeypatch.setattr(HostCopies, "_move", noted)
    return made


# Compiled slices make a graph for each length: ten to twenty seconds, and test_model.py makes them too. One compiled case stands for all.
CASES = [
    pytest.param(name, batch, compiles, marks=[pytest.mark.full] if compiles and (name, batch) != ("full", 1) else [])
    for name in MODES
    for batch in (1, 2)
    for compiles in (False, True)
]


@pytest.mark.parametrize(("name", "batch", "compiles"), CASES)
def test_no_bit_changes(moves, name, batch, compiles):
    results = []
    for offload in (False, True):
        assert not moves
        model = recomputing_model(offload, compiles=compiles, **MODES[name])
        loss = forward(model, batch)
        loss.backward()
        results.append((loss, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert len([copy for copy, leaves in moves if leaves]) == {"full": 4, "full every two layers": 2, "slices": 12, "one slice": 4}[name]


def test_the_embedding_that_every_block_adds_stays_on_the_device(moves):
    results = []
    for offload in (False, True):
        model = recomputing_model(offload, mode="full", embedding_scalars=True)
        loss = forward(model, 2)
        loss.backward()
        results.append((loss, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert [copy for copy, leaves in moves if leaves] == [0, 1, 2]  # the inputs of four blocks but for the first one, which is the embedding


def test_each_input_is_fetched_once_while_the_block_after_it_is_recomputed(moves, monkeypatch):
    """The last one has not left yet when backward needs it."""
    compute = Block._forward
    monkeypatch.setattr(Block, "_forward", lambda block, *arguments: (moves.append("block"), compute(block, *arguments))[1])
    loss = forward(recomputing_model(True, mode="full"), 2)
    assert moves == [(0, True), "block", (1, True), "block", (2, True), "block", (3, True), "block"]
    loss.backward()
    assert moves[8:] == [(2, False), "block", (1, False), "block", (0, False), "block", "block"]


def test_microbatches_of_a_pipeline_do_not_mix(moves):
    """Three forwards, then their backwards in the same order."""
    model, losses = recomputing_model(True, mode="full"), []
    for batch in (1, 2, 1):
        losses.append(forward(model, batch))
    gradients = []
    for loss in losses:
        model.zero_grad()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.blocks.parameters()])
    for batch, found in zip((1, 2, 1), gradients, strict=True):
        plain = recomputing_model(False, mode="full")
        forward(plain, batch).backward()
        assert all(torch.equal(*pair) for pair in zip(found, (parameter.grad for parameter in plain.blocks.parameters()), strict=True))
    assert [copy for copy, leaves in moves if not leaves] == [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8]


@pytest.mark.parametrize("mode", ["full", "slices"])
def test_the_device_keeps_two_inputs(mode, monkeypatch):
    """Counted at every copy: memory of the residual stream that is not a copy in host memory."""
    model, inputs, most = recomputing_model(True, mode=mode, slice_tokens=10, layers=8), [], []
    for block in model.blocks.values():
        block.run_outside = noting(inputs, block.run_outside)
    move = HostCopies._move

    def counted(self, copy, to, source):
        held = [each for each in inputs if each() is not None]
        most.append(len(held))
        move(self, copy, to, source)
        if to is not copy.host:
            inputs.append(weakref.ref(to.untyped_storage()))

    monkeypatch.setattr(HostCopies, "_move", counted)
    loss = forward(model, 1)
    assert len(inputs) == 8 and max(most) <= 2
    loss.backward()
    assert max(most) <= 2 and not any(each() is not None for each in inputs)


def noting(inputs, run):
    def noted(block, x, *rest):
        inputs.append(weakref.ref(x.untyped_storage()))
        return run(block, x, *rest)

    return noted


def test_what_backward_has_used_leaves_the_device_even_where_the_graph_stays(monkeypatch):
    copies, leave = [], HostCopies._leave
    monkeypatch.setattr(HostCopies, "_leave", lambda *arguments: (copies.append(leave(*arguments)), copies[-1])[1])
    forward(recomputing_model(True, mode="full"), 1).backward(retain_graph=True)
    assert len(copies) == 4 and all(copy.on_device is None for copy in copies)


def test_copies_end_with_backward():
    model, made = recomputing_model(True, mode="full"), []
    init = host_copies._Copy.__init__

    def noted(self, *arguments, **options):
        init(self, *arguments, **options)
        made.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_copies._Copy, "__init__", noted)
        for loss in [forward(model, 1), forward(model, 2)]:
            loss.backward()
    assert len(made) == 8 and not any(each() is not None for each in made)


def test_evaluation_copies_nothing(moves):
    model = recomputing_model(True, mode="full")
    with torch.no_grad():
        forward(model, 1)
    assert moves == []


def test_a_chunk_after_another_leaves_its_input_where_the_pipeline_holds_it(moves):
    model = recomputing_model(True, mode="full")
    model.begins = False
    apply_recomputation(model, "full", offload_inputs=True)
    x = torch.randn(1, 29, 24, requires_grad=True)
    model(None, x=x, sequence_length=29)[0].sum().backward()
    assert [copy for copy, leaves in moves if leaves] == [0, 1, 2]
