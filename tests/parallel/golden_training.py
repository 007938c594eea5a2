"""The runs whose numbers a change of structure must keep: twenty steps in float32 on every topology, as jobs of the pool.

`train` is the only function that knows how a config is trained. What it calls of the library is imported here and nowhere else in the
comparison, beside the train state, which is that of the parity tests: none of its parameters has its initial value, so no convolution is the
identity.
"""

import hashlib
import itertools
import math
import os
from dataclasses import dataclass

import torch

from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.config.validate import validate
from phase8.data.microbatch import split_sample
from phase8.distributed.placement import collected
from phase8.optim.schedule import learning_rate
from phase8.train.engine.step import train_step
from tests.parallel.training import new_train_state

NUM_STEPS = 20
# Each data-parallel rank takes three microbatches in a step, for the sum of two numbers does not depend on their order; each has so many sequences.
NUM_MICROBATCHES, MICRO_BATCH_SIZE = 3, 2
SEQUENCE_LENGTH, VOCABULARY_SIZE = 32, 256
DOCUMENT_RATIO = 0.1  # tokens that begin a document, over all tokens

TINY = (
    "model.global_path=linear", "model.d_model=64", "model.num_layers=4", "model.num_heads=4", "model.ffn_size=96", "model.local_window_size=[6,20]",
    "model.local_qk_norm=false", "model.global_gate=scalar", "model.global_activation=none",
    f"model.vocab_size={VOCABULARY_SIZE}", f"model.sequence_length={SEQUENCE_LENGTH}", "precision.dtype=fp32", "precision.tf32=false",
    f"train.num_steps={NUM_STEPS}", f"train.micro_batch_size={MICRO_BATCH_SIZE}", "optim.learning_rate=3e-3", "optim.warmup_steps=4",
)  # fmt: skip
TENSOR, STAGES, ZERO = "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2", "zero.stage=3"
TOPOLOGIES = {  # number of ranks, data-parallel ranks, settings
    "one": (1, 1, ()),
    "tp2": (2, 1, (TENSOR,)),
    "pp2": (2, 1, (STAGES,)),
    "dp2-zero3": (2, 2, (ZERO,)),
    "tp2-pp2": (4, 1, (TENSOR, STAGES)),
}
BLOCKS = {"phase8": (), "transformer": ("model.block=transformer",)}
MATRICES = {"dense": (), "low-rank": ("model.low_rank_rank=8", "model.ffn=low_rank_swiglu")}
HEADS = {"untied": (), "tied": ("model.tie_embeddings=true",)}
MODELS = {
    "-".join(names): tuple(itertools.chain(BLOCKS[names[0]], MATRICES[names[1]], HEADS[names[2]]))
    for names in itertools.product(BLOCKS, MATRICES, HEADS)
}
WHOLE = ("model.score=lorentz", "model.chain=both", "model.global_tokens=3")
EXTRAS = {  # topology and settings of parts that the models above lack
    "one-lorentz": ("one", ("model.score=lorentz",)),
    "one-chain-both": ("one", ("model.chain=both",)),
    "one-chain-decay": ("one", ("model.chain=decay",)),
    "one-chain-gate": ("one", ("model.chain=gate",)),
    "one-global-tokens": ("one", ("model.global_tokens=3",)),
    "one-window-alone": ("one", ("model.global_path=none",)),
    "one-transformer-convolution": ("one", ("model.block=transformer", "model.convolution_size=4")),
    "one-whole-recomputed": ("one", (*WHOLE, "train.recompute=full")),
    "one-whole-selective": ("one", (*WHOLE, "train.recompute=selective")),
    "tp2-pp2-whole": ("tp2-pp2", WHOLE),
    "dp2-zero3-whole": ("dp2-zero3", WHOLE),
}


@dataclass(frozen=True)
class Case:
    """A run.

    Args:
        world_size: Ranks.
        data_parallel_size: Ranks that read different sequences.
        settings: Overrides of the config, model and topology.
    """

    world_size: int
    data_parallel_size: int
    settings: tuple[str, ...]


def _case(topology, model):
    world_size, readers, settings = TOPOLOGIES[topology]
    batch = f"train.global_batch_size={NUM_MICROBATCHES * MICRO_BATCH_SIZE * readers}"
    return Case(world_size, readers, (*TINY, batch, *settings, *model))


CASES = {f"{topology}-{name}": _case(topology, model) for topology in TOPOLOGIES for name, model in MODELS.items()}
CASES |= {name: _case(topology, model) for name, (topology, model) in EXTRAS.items()}


def train(case):
    """Trains a case: loss and gradient norm of every step, and the final parameters, whole, by their full names (on the first rank)."""
    config = without_auto(load_config(os.devnull, case.settings))
    validate(config, world_size=case.world_size)
    train_state = new_train_state(config, case.world_size, device_type="cpu", dtype=torch.float32)
    index = train_state.mesh.data_parallel_index
    results = [
        train_step(
            train_state,
            [split_sample(sample, reset_at_document_boundaries=resets) for sample, resets in samples(step, case, index)],
            learning_rate=learning_rate(step, config.optim, num_steps=config.train.num_steps),
            gradient_clip_norm=config.optim.gradient_clip_norm,
        )
        for step in range(1, NUM_STEPS + 1)
    ]
    parameters = collected({name: parameter.detach() for name, parameter in train_state.stage.module.named_parameters()}, train_state.mesh)
    return [(result.loss, result.grad_norm) for result in results], parameters


def samples(step, case, reader):
    """The microbatches of a data-parallel rank; every second one is reset at document boundaries, which the bool says."""
    generator = torch.Generator().manual_seed(step)
    shape = (case.data_parallel_size, NUM_MICROBATCHES, MICRO_BATCH_SIZE, SEQUENCE_LENGTH + 1)
    tokens = torch.randint(0, VOCABULARY_SIZE, shape, generator=generator)[reader]
    starts = (torch.rand(shape, generator=generator) < DOCUMENT_RATIO)[reader]
    starts[..., 0] = True
    return [({"tokens": tokens[number], "document_starts": starts[number]}, number % 2 == 1) for number in range(NUM_MICROBATCHES)]


def golden_numbers(name):
    """A job of the pool: the numbers of a case as JSON values, exact to the bit; None on all ranks but the first."""
    torch.use_deterministic_algorithms(True)
    try:
        steps, parameters = train(CASES[name])
    finally:
        torch.use_deterministic_algorithms(False)
    if torch.distributed.get_rank() != 0:
        return None
    if not all(math.isfinite(value) for values in steps for value in values):
        raise ValueError(f"{name} diverges, and its numbers prove nothing; lower its learning rate.")
    return {
        "loss": [loss.hex() for loss, _ in steps],
        "gradient norm": [norm.hex() for _, norm in steps],
        "parameters": {name: digest(value) for name, value in parameters.items()},
    }


def digest(tensor):
    """SHA-256 of dtype, shape and bytes of a tensor."""
    form = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return hashlib.sha256(form + tensor.cpu().contiguous().numpy().tobytes()).hexdigest()
