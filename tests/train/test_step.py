import math

import pytest
import torch
import torch.nn.functional as F

from phase8.config.model_section import ModelSection
from phase8.config.pipeline import pipeline_of
from phase8.config.schema import ParallelSection, ZeroSection
from phase8.data.microbatch import split_sample
from phase8.distributed.collectives import ALONE
from phase8.distributed.mesh import build_mesh
from phase8.kernels.reference.cross_entropy import IGNORED_TARGET
from phase8.model.model import build_model
from phase8.model.parameters import initialise
from phase8.topology import Topology
from phase8.train.engine.measured import evaluate
from phase8.train.engine.shards import Shards
from phase8.train.engine.stage import Stage
from phase8.train.engine.step import train_step
from phase8.train.engine.train_state import TrainState

SECTION = ModelSection(
    d_model=16, num_layers=1, num_heads=2, vocab_size=31, sequence_length=8, local_window_size=3, global_tokens=2, ffn_size=24
)


@pytest.fixture
def model():
    model = build_model(SECTION, dtype=torch.float32, device=torch.device("cpu"))
    initialise(model, seed=1)
    return model


def alone(model, optimizer):
    """A train state of one process."""
    mesh = build_mesh(Topology(), device_type="cpu", shard_size=1)
    stage = Stage([model], pipeline_of(ParallelSection()), mesh, zero=ZeroSection(), device=torch.device("cpu"))
    return TrainState(stage, Shards(model, tensor_axis=ALONE, holders=()), optimizer)


def sample(*, batch_size=2, seed=0, starts=()):
    """T + 1 tokens of each sequence; documents begin at the first token and at the given (row, column)."""
    tokens = torch.randint(0, 31, (batch_size, 9), generator=torch.Generator().manual_seed(seed))
    document_starts = torch.zeros(batch_size, 9, dtype=torch.bool)
    document_starts[:, 0] = True
    for row, column in starts:
        document_starts[row, column] = True
    return {"tokens": tokens, "document_starts": document_starts}


def split(*samples, reset=False):
    return [split_sample(each, reset_at_document_boundaries=reset) for each in samples]


def mean_loss(model, microbatches):
    """Mean over the valid targets, from the logits."""
    total, count = torch.zeros(()), 0
    for batch in microbatches:
        logits = model.logits(model(batch.tokens, batch.starts)[0])
        total = total + F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")
        count += int((batch.targets != IGNORED_TARGET).sum())
    return total / count


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def gradients(model, microbatches):
    return dict(zip(snapshot(model), torch.autograd.grad(mean_loss(model, microbatches), list(model.parameters())), strict=True))


def test_targets_are_the_tokens_that_follow():
    whole = sample(starts=[(0, 4)])
    (batch,) = split(whole)
    assert torch.equal(batch.tokens, whole["tokens"][:, :8]) and torch.equal(batch.targets, whole["tokens"][:, 1:])
    assert batch.starts is None and batch.num_valid == 16


def test_the_first_token_of_a_document_is_not_predicted_from_the_one_before():
    whole = sample(starts=[(0, 4), (1, 1), (1, 8)])
    (batch,) = split(whole, reset=True)
    expected = whole["tokens"][:, 1:].clone()
    for row, column in ((0, 3), (1, 0), (1, 7)):
        expected[row, column] = IGNORED_TARGET
    assert torch.equal(batch.targets, expected) and batch.num_valid == 13
    assert torch.equal(batch.starts, whole["document_starts"][:, :8])


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e6])
def test_a_step_follows_the_clipped_mean_gradient_over_all_valid_targets(model, limit):
    batches = split(sample(starts=[(0, 2), (1, 3), (1, 5)]), sample(seed=1), reset=True)
    assert batches[0].num_valid != batches[1].num_valid
    expected, before, loss = gradients(model, batches), snapshot(model), mean_loss(model, batches).item()
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in expected.values()))
    scale = limit / norm if 0 < limit < norm else 1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0, fused=True)
    result = train_step(alone(model, optimizer), batches, learning_rate=0.5 / scale, gradient_clip_norm=limit)
    assert (result.loss, result.grad_norm, result.skipped) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-3), False)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5 / scale]
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), before[name] - 0.5 * expected[name], rtol=1e-3, atol=2e-4, msg=name)
        assert value.grad is None


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_weights_and_optimizer_alone(model, spoil):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    if spoil == "gradient":
        model.embedding.weight.register_hook(lambda gradient: gradient * math.inf)
    else:
        original = model.loss_sum
        model.loss_sum = lambda *arguments: original(*arguments) * math.nan
    before = snapshot(model)
    result = train_step(alone(model, optimizer), split(sample()), learning_rate=0.1, gradient_clip_norm=1.0)
    assert result.skipped and math.isfinite(result.loss) == (spoil == "gradient") and not math.isfinite(result.grad_norm)
    assert all(torch.equal(value, before[name]) and value.grad is None for name, value in model.named_parameters())
    assert not any(value.any() for entry in optimizer.state.values() for value in entry.values())


def test_a_step_without_any_valid_target_changes_nothing_by_gradient(model):
    (batch,) = split(sample(starts=[(row, column) for row in (0, 1) for column in range(1, 9)]), reset=True)
    before = snapshot(model)
    result = train_step(alone(model, torch.optim.SGD(model.parameters(), fused=True)), [batch], learning_rate=1.0, gradient_clip_norm=1.0)
    assert batch.num_valid == 0 and (result.loss, result.grad_norm, result.skipped) == (0.0, 0.0, False)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_evaluation_is_the_mean_over_valid_targets_and_changes_nothing(model):
    batches = split(sample(starts=[(0, 2), (1, 3), (1, 5)]), sample(batch_size=1, seed=1), reset=True)
    before = snapshot(model)
    loss, num_targets = evaluate(alone(model, None).stage, iter(batches))
    assert num_targets == 13 + 8 and loss == pytest.approx(mean_loss(model, batches).item(), rel=1e-5)
    assert evaluate(alone(model, None).stage, batches) == (loss, num_targets)
    assert all(torch.equal(value, before[name]) and value.grad is None for name, value in model.named_parameters())
