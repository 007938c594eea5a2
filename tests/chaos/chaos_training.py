"""Kills ranks of a run that trains, at random moments, and looks at what is left each time and at the end."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phase8.checkpoint.load import Checkpoint, newest_good_checkpoint, open_checkpoint
from phase8.checkpoint.reshard.compare import compare_checkpoints
from phase8.checkpoint.step_directories import step_directory_name
from phase8.errors import CheckpointError
from phase8.observe.metrics import read_metrics
from tests.chaos.chaos_launcher import LONG, Group, Launcher
from tests.train.tiny_run import write_documents

NUM_RANKS, STEPS = 2, 60
BANNER = "phase8 pretraining"  # rank 0 prints it when the checkpoint is loaded and steps are about to begin
# Exit codes: killed; asked to end, before or after the rank has met the others; told that a rank is lost; finished, just before the fault.
ENDS = (-9, -15, 143, 7, 0)
STARTING_SHARE = 0.25  # of the faults come before that, while ranks meet and load
CONFIG = """
run: {{name: tiny, output_dir: {directory}/runs}}
model: {{d_model: 24, num_layers: 2, num_heads: 4, vocab_size: 61, sequence_length: 24, ffn_size: 40, local_window_size: [6, 12],
  global_tokens: 3, score: lorentz, chain: both}}
data: {{train: {directory}/train}}
precision: {{dtype: fp32}}
optim: {{learning_rate: 1e-2, warmup_steps: 3}}
train: {{global_batch_size: 4, num_steps: {steps}}}
observe: {{tensorboard: false, report: false}}
"""
TOPOLOGIES = {  # also names of the undisturbed runs
    "data-2-zero-3": ("zero.stage=3",),
    "tensor-2": ("parallel.tensor_parallel_size=2",),
    "stages-2": ("parallel.pipeline_parallel_size=2", "parallel.num_microbatches=2"),
}
SAVES = {
    "saves every 3 steps": ("checkpoint.every_n_steps=3",),
    "asynchronous saves every step": ("checkpoint.every_n_steps=1", "checkpoint.asynchronous=true"),
}
VICTIMS = ("one rank", "all ranks")


@dataclass(frozen=True)
class Kind:
    """What is done to a run.

    Args:
        victims: One of VICTIMS.
        saves: A key of SAVES.
    """

    victims: str
    saves: str

    def __str__(self) -> str:
        return f"{self.victims} killed, {self.saves}"


def never_damaged(path: Path, error: CheckpointError) -> None:
    raise AssertionError(f"{path} is damaged: {error}")


class TrainingChaos:
    """Runs that share data, and the undisturbed run of each topology.

    Args:
        directory: Where everything is.
        generator: Of all that is random.
    """

    def __init__(self, directory: Path, generator: random.Random):
        self.directory, self.launcher, self._generator = directory, Launcher(directory / "logs"), generator
        self._config = directory / "chaos.yaml"
        self._undisturbed: dict[str, float] = {}  # topology -> seconds from the banner to the end
        self._starting_seconds, self._num_runs = 0.0, 0
        write_documents(directory / "train", num_documents=200, seed=0)
        self._config.write_text(CONFIG.format(directory=directory, steps=STEPS))

    def undisturbed(self, topology: str) -> str:
        """Name of the run that nothing happens to."""
        if topology not in self._undisturbed:
            begin = time.monotonic()
            group = self._start(topology, topology, "saves every 3 steps")
            self._wait_for_banner(group)
            self._starting_seconds = time.monotonic() - begin
            assert group.end() == [0] * NUM_RANKS, group.output
            self._undisturbed[topology] = time.monotonic() - begin - self._starting_seconds
            assert len(self._figures(topology)) == STEPS
        return topology

    def newest_checkpoint(self, name: str) -> Checkpoint | None:
        """The newest checkpoint of a run, every byte of it checked; no newer one may be damaged."""
        return newest_good_checkpoint(self._path(name) / "checkpoints", on_damaged=never_damaged)

    def disturbed_run(self, kind: Kind, topology: str, *, max_faults: int) -> Iterator[dict]:
        """Trains a run to its end in spite of faults, and compares it with the undisturbed one.

        Args:
            kind: What is killed, and how the run saves.
            topology: A key of TOPOLOGIES.
            max_faults: Faults before it is left alone.

        Yields:
            A record of each fault, and of the run at the end.
        """
        undisturbed = self.undisturbed(topology)
        self._num_runs += 1
        name, newest, count = f"disturbed-{self._num_runs}", 0, 0
        while count < max_faults:
            group = self._start(name, topology, kind.saves)
            victims = self._kill(group, kind, topology)
            codes = group.end()
            if -9 not in codes:  # the run was faster
                break
            count += 1
            assert set(codes) <= set(ENDS), f"{codes}\n{group.output}"
            newest, record = self._look(name, group, newest)
            yield {"record": "fault", "kind": str(kind), "topology": topology, "run": name, "victims": victims, "exit_codes": codes, **record}
        if count == max_faults:
            group = self._start(name, topology, kind.saves)
        assert group.end() == [0] * NUM_RANKS, group.output
        self._assert_same(name, undisturbed)
        yield {"record": "run", "kind": str(kind), "topology": topology, "run": name, "faults": count, "bit_equal": True}

    def _start(self, name: str, topology: str, saves: str) -> Group:
        settings = [f"run.name={name}", *TOPOLOGIES[topology], *SAVES[saves]]
        arguments = ["--config", self._config, "--device", "cpu", "--set", *settings]
        return self.launcher.start("launch/pretrain.py", arguments, num_ranks=NUM_RANKS)

    def _kill(self, group: Group, kind: Kind, topology: str) -> list[int]:
        """Kills at a random moment."""
        generator = self._generator
        if generator.random() < STARTING_SHARE:
            time.sleep(generator.uniform(0, self._starting_seconds))
        else:
            self._wait_for_banner(group)
            time.sleep(generator.uniform(0, self._undisturbed[topology] / 3))
        victims = [generator.randrange(NUM_RANKS)] if kind.victims == "one rank" else list(range(NUM_RANKS))
        group.kill(victims)
        return victims

    def _wait_for_banner(self, group: Group) -> None:
        deadline = time.monotonic() + LONG
        while BANNER not in group.output and group.is_running:
            assert time.monotonic() < deadline, group.output
            time.sleep(0.01)

    def _look(self, name: str, group: Group, newest_before: int) -> tuple[int, dict]:
        """The step of the newest checkpoint after a fault, and what there is to say about it."""
        checkpoint = self.newest_checkpoint(name)
        newest = 0 if checkpoint is None else checkpoint.step
        records = self._records(name)
        told = max((record["checkpoint_step"] for record in records if record.get("event") == "checkpoint"), default=0)
        assert newest >= max(newest_before, told), f"step {newest} is the newest, after {newest_before}; step {told} was saved"
        has_trained = BANNER in group.output
        step = max((record["step"] for record in records), default=0) if has_trained else newest
        found = {"moment": "training" if has_trained else "starting", "newest_checkpoint": newest, "steps_lost": max(0, step - newest)}
        leftovers = [path.name for path in (self._path(name) / "checkpoints").glob(".saving-*")]
        return newest, {**found, "step": step, "during_a_save": bool(leftovers)}

    def _assert_same(self, name: str, other: str) -> None:
        assert self._figures(name) == self._figures(other), f"run {name} and {other}"
        ends = [open_checkpoint(self._path(each) / "checkpoints" / step_directory_name(STEPS)) for each in (name, other)]
        assert not list(compare_checkpoints(*ends)) and ends[0].metadata["position"] == ends[1].metadata["position"]

    def _figures(self, name: str) -> list[tuple[float, float]]:
        return [(record["loss"], record["grad_norm"]) for record in self._records(name) if "grad_norm" in record]

    def _records(self, name: str) -> list[dict]:
        path = self._path(name) / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def _path(self, name: str) -> Path:
        return self.directory / "runs" / name
