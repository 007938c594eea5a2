"""The samples that a run has read, step by step, do not depend on interruptions, on the ranks, or on the size of microbatches."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from phase8.config.load import load_config
from phase8.train.build import build_run
from phase8.train.loop import train
from tests.train.tiny_run import write_documents

STEPS, BATCH = 14, 8
CONFIG = """
run: {{name: tiny, output_dir: {directory}/runs}}
model: {{d_model: 24, num_layers: 2, num_heads: 4, vocab_size: 61, sequence_length: 24, ffn_size: 40, local_window_size: 6, global_tokens: 3}}
data: {{train: [{{path: {directory}/first, weight: 3}}, {{path: {directory}/second, weight: 1}}]}}
precision: {{dtype: fp32}}
train: {{global_batch_size: {batch}, num_steps: {steps}}}
optim: {{warmup_steps: 3}}
checkpoint: {{every_n_steps: 2}}
observe: {{tensorboard: false, report: false}}
"""
# Settings, ranks (None: this process, which may have loader workers), and the step in which the ranks are interrupted, unsaved. Those that
# are not stop after the step that is given, and save.
LEGS = (
    (("train.micro_batch_size=4", "train.stop_at_step=3"), 1, None),
    (("zero.stage=2", "train.micro_batch_size=1"), 4, 6),
    (("zero.stage=3", "parallel.tensor_parallel_size=2", "train.micro_batch_size=2", "train.stop_at_step=7"), 4, None),
    (("parallel.pipeline_parallel_size=2", "train.micro_batch_size=2"), 2, 10),
    (("parallel.pipeline_parallel_size=2", "zero.stage=1", "train.micro_batch_size=1", "train.stop_at_step=11"), 4, None),
    (("train.micro_batch_size=8", "data.num_workers=1"), None, None),
)


class Interrupted(Exception):
    pass


class Recorded:
    """A data set that writes down what is read from it, by number and by place.

    Args:
        dataset: The real one.
        path: Where.
    """

    def __init__(self, dataset, path):
        self._dataset, self._path = dataset, path
        self.order, self.history, self.sources, self.own_slice = dataset.order, dataset.history, dataset.sources, dataset.own_slice
        self.follow = dataset.follow  # the blend stays, so it changes nothing

    def __getitem__(self, number):
        with self._path.open("a") as file:  # it may be another process that reads
            print(number, *self.order.locate(number), file=file)
        return self._dataset[number]


def leg(config, settings, directory, interrupted_in, world_size):
    """What a rank does: trains as launch/pretrain.py does.

    Returns:
        Its data-parallel index, samples of a microbatch, the step that the leg went on from, and what it has read, in order.
    """
    console, rank = Console(quiet=True), dist.get_rank() if dist.is_initialized() else 0
    run = build_run(load_config(config, settings), device=torch.device("cpu"), resume="auto", console=console, world_size=world_size)
    path, begin = directory / f"read-by-{rank}", run.position.step
    run = replace(run, data=replace(run.data, train=Recorded(run.data.train, path)))

    def report(step, doing):
        if step == interrupted_in and doing == "training":
            raise Interrupted

    try:
        train(run, resume_command="", report=report)
    except Interrupted:
        assert interrupted_in is not None
    read = [tuple(map(int, line.split())) for line in path.read_text().splitlines()]
    return run.engine.mesh.data_parallel_index, run.shape.micro_batch_size, begin, read


def in_order(ranks):
    """What all ranks have read together, in the one order that there is: readers take microbatches in turn."""
    readers = {}
    for index, micro_batch_size, _, read in ranks:
        assert readers.setdefault(index, (micro_batch_size, read)) == (micro_batch_size, read)  # ranks of other axes read the same
    microbatches = [
        [read[first : first + size] for first in range(0, len(read), size)] for size, read in (readers[index] for index in range(len(readers)))
    ]
    return [sample for turn in zip(*microbatches, strict=True) for microbatch in turn for sample in microbatch]


@pytest.fixture
def take_leg(pool, tmp_path):
    """Trains for a while: the step that it went on from, and what was read of each step."""
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(directory=tmp_path, batch=BATCH, steps=STEPS))
    for seed, name in enumerate(("first", "second")):
        write_documents(tmp_path / name, num_documents=40, seed=seed)  # fewer than are read: a second epoch begins

    def take_leg(name, *settings, world_size, interrupted_in=None):
        directory = tmp_path / f"leg-{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        arguments = (config, [f"run.name={name}", *settings], directory, interrupted_in, world_size or 1)
        ranks = pool.run(leg, *arguments, world_size=world_size, timeout_seconds=600.0) if world_size else [leg(*arguments)]
        begin, samples = ranks[0][2], in_order(ranks)
        read = [samples[first : first + BATCH] for first in range(0, len(samples), BATCH)]
        return begin, dict(enumerate(read, start=begin + 1))

    return take_leg


@pytest.mark.slow
def test_the_samples_of_every_step_are_those_of_the_run_that_nothing_happened_to(take_leg):
    begin, expected = take_leg("undisturbed", "train.micro_batch_size=2", world_size=1)
    assert begin == 0 and list(expected) == list(range(1, STEPS + 1))
    assert [number for step in expected.values() for number, _, _ in step] == list(range(STEPS * BATCH))
    places = [place for step in expected.values() for _, *place in step]
    assert {source for source, _ in places} == {0, 1} and len(set(map(tuple, places))) < len(places)  # two sources, more than one epoch
    found, begins = {}, []
    for settings, world_size, interrupted_in in LEGS:
        begin, read = take_leg("disturbed", *settings, world_size=world_size, interrupted_in=interrupted_in)
        begins.append(begin)
        for step, samples in read.items():
            if step <= STEPS:  # a worker may read ahead
                assert samples == expected[step], f"step {step}, {settings}"
        found.update(read)
    assert begins == [0, 3, 4, 7, 8, 11]  # what was interrupted goes on from the checkpoint before
    assert {step: samples for step, samples in found.items() if step <= STEPS} == expected
