"""A recorded step keeps nothing of the time of its recording: what changes from step to step is what a step that is launched would see.

Here without a GPU (`tests/tape.py`). Streams, memory that is freed, and numbers of Python in Triton kernels are for GPUs: test_gpu_parity.py,
test_evaluations.py, tests/train/test_gpu.py.
"""

import os
from contextlib import closing, contextmanager, nullcontext

import pytest
import torch

from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.save import save_checkpoint
from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.train.engine.fsdp import FsdpEngine
from tests.parallel import training
from tests.parallel.test_parity import BLOCKS, ranks
from tests.parallel.training import microbatches_of, new_train_state
from tests.tape import recorded_on_a_cpu

NUM_STEPS = 8
# What Python gives to each step, numbered from 0; the third one is recorded.
RATES = [1e-2, 3e-3, 2e-2, 1e-3, 1e-2, 5e-3, 0.0, 1e-2]
CALLS = {3: {"largest_loss": 0.0}, 4: {"stop": True}, 6: {"unreadable": True}}
NOT_FINITE = 5  # a step of weights that are no numbers, which it leaves as they are, as it leaves moments, counters and routers
QUICK = {
    "whole": ("whole", ranks()),
    "experts": ("experts", ranks()),
    "muon": ("muon", ranks()),
    "fp8 moments": ("fp8 moments", ranks()),
    "dp2 zero 1": ("default", ranks(dp=2, stage=1)),
}
FULL = {
    **{block: (block, ranks()) for block in BLOCKS if not block.startswith("deep") and block not in QUICK},
    "recomputed": ("whole", ranks(more=("train.recompute=full",))),
    "in slices": ("whole", ranks(more=("train.recompute=slices", "train.recompute_slice_tokens=10"))),
    "dp2": ("tied", ranks(dp=2)),
    "dp2 zero 2": ("tied", ranks(dp=2, stage=2)),
    "dp2 zero 3": ("muon", ranks(dp=2, stage=3)),
    "tp2": ("default", ranks(tp=2)),
    "tp2 grouped": ("grouped", ranks(tp=2)),
    "tp2 experts": ("experts", ranks(tp=2)),
    "cp2": ("whole", ranks(cp=2)),
    "cp2 zero 3": ("delta-options", ranks(cp=2, stage=3)),
    "cp2 transformer": ("transformer", ranks(cp=2)),
    "ep2 zero 1": ("experts", ranks(dp=2, ep=2, stage=1)),
}
LAYOUTS = QUICK | FULL


def new_engine(settings=(), world_size=1, *, is_recorded):
    config = without_auto(load_config(os.devnull, [*training.MODEL, *settings, f"train.cuda_graphs={is_recorded}"]))
    return FsdpEngine(new_train_state(config, world_size, device_type="cpu", dtype=torch.float64), config), config


def take_step(engine, batch, *, learning_rate=1e-2, clip_norm=0.3, **more):
    return engine.update(batch, learning_rate=learning_rate, gradient_clip_norm=clip_norm, **more)


@contextmanager
def spoiled(engine):
    """A context in which a parameter is not a number."""
    part = engine.train_state.shards.parts["blocks.0.mixer_norm.weight"].detach()
    before = part.clone()
    part.fill_(torch.nan)
    yield
    assert part.isnan().all()
    part.copy_(before)


def found_in_steps(settings, world_size, is_recorded):
    """A job: what eight steps measure, and evaluations after some of them."""
    torch.set_default_dtype(torch.float64)
    found = []
    with recorded_on_a_cpu() if is_recorded else nullcontext():
        engine, config = new_engine(settings, world_size, is_recorded=is_recorded)
        with closing(engine):
            for number in range(NUM_STEPS):
                with spoiled(engine) if number == NOT_FINITE else nullcontext():
                    result = take_step(engine, microbatches_of(engine, config, number), learning_rate=RATES[number], **CALLS.get(number, {}))
                found.append((result.loss, result.grad_norm, *result.auxiliary_losses.values(), *(each.load[0] for each in result.routing.values())))
                found.append((result.skipped, result.stop, result.unreadable))
                if number % 2:
                    found.append(engine.evaluate(microbatches_of(engine, config, 99)))
    torch.set_default_dtype(torch.float32)
    return found


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in FULL)])
def test_a_replay_sees_what_a_launched_step_sees(pool, name):
    block, (world_size, settings) = LAYOUTS[name]
    settings = (*BLOCKS[block], *settings)
    launched, recorded = (pool.run(found_in_steps, settings, world_size, how, world_size=world_size)[0] for how in (False, True))
    assert [number for number, each in enumerate(each for each in launched if isinstance(each[0], bool)) if each[0]] == [3, NOT_FINITE, 6]
    assert len(launched) == len(recorded)
    for one, other in zip(launched, recorded, strict=True):
        assert other == pytest.approx(one, rel=1e-9, nan_ok=True)


@pytest.fixture
def engines(double):
    """An engine that launches its steps, and one that records them and has taken a recorded one."""
    with recorded_on_a_cpu():
        (launching, config), (recording, _) = new_engine(is_recorded=False), new_engine(is_recorded=True)
        with closing(recording):
            for number in range(3):
                batch = microbatches_of(launching, config, number)
                assert take_step(recording, batch).loss == pytest.approx(take_step(launching, batch).loss, rel=1e-9)
            yield launching, recording, config


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_microbatches_on_the_device_are_not_written(double):
    """The recording reads its own: those that were recorded may be one and the same, and are still the caller's."""
    with recorded_on_a_cpu():
        (launching, config), (recording, _) = new_engine(is_recorded=False), new_engine(is_recorded=True)
        batches = [microbatches_of(launching, config, number) for number in range(4)]
        batches[2] = batches[2][:1] * len(batches[2])
        tokens = batches[2][0].tokens.clone()
        for batch in batches:
            launched, recorded = take_step(launching, batch), take_step(recording, batch)
            assert recorded.loss == pytest.approx(launched.loss, rel=1e-9)
        assert torch.equal(batches[2][0].tokens, tokens)


def test_a_step_that_differs_in_what_a_recording_keeps_is_refused(engines):
    launching, recording, config = engines
    batch = microbatches_of(launching, config, 3)
    smaller = [type(each)(each.tokens[:1], each.targets[:1], each.starts[:1], each.num_valid) for each in batch]
    with pytest.raises(ValueError, match=r"takes microbatches of \[4, 24\], as recorded, not \[1, 24\]"):
        take_step(recording, smaller)
    with pytest.raises(ValueError, match="shorter"):
        take_step(recording, batch[:1])
    with pytest.raises(ValueError, match=r"clips gradients at 0\.3, as recorded, not at 1\.0"):
        take_step(recording, batch, clip_norm=1.0)
    assert take_step(recording, batch).loss == pytest.approx(take_step(launching, batch).loss, rel=1e-9)


@pytest.mark.parametrize("has_state", [True, False])
def test_a_recorded_engine_takes_a_checkpoint(engines, tmp_path, has_state):
    """One without the optimizer's state too, as of a run that was stopped before its first step: the state that a recording has written is gone."""
    launching, recording, config = engines
    state = {name: value.detach().clone() for name, value in launching.state().items() if has_state or name.startswith("model.")}
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, step=3, tensors=state, metadata={}, attachments={}))
    take_step(recording, microbatches_of(launching, config, 3))
    for engine in (launching, recording):
        engine.restore(checkpoint)
    for number in range(4, 9):
        batch = microbatches_of(launching, config, number)
        launched, recorded = take_step(launching, batch), take_step(recording, batch)
        assert (recorded.loss, recorded.grad_norm) == pytest.approx((launched.loss, launched.grad_norm), rel=1e-9)
