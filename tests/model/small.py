"""Small models for tests: every shipped config scaled down, with weights that hide nothing."""

from pathlib import Path

import torch

from phase8.config.load import load_config
from phase8.config.model_section import ModelSection
from phase8.config.rope_scaling import RopeScaling
from phase8.distributed.collectives import ALONE, Axis
from phase8.model.model import LanguageModel, build_model
from phase8.model.parameters import initialise

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
LENGTH = 29
# A head of six channels has three frequencies: this scaling keeps the first, divides the second by 1.8, and the third by 4.
LLAMA3 = RopeScaling(type="llama3", factor=4.0, low_frequency_factor=0.15, high_frequency_factor=0.5, original_sequence_length=40)


def scaled_down(model: ModelSection, **changes) -> ModelSection:
    """The same kind of model at a size where float64 on a CPU is instant."""
    small = {
        "d_model": 24,
        "num_layers": 2,
        "num_heads": 4,
        "head_size": None,
        "ffn_size": 40,
        "vocab_size": 61,
        "sequence_length": LENGTH,
        "low_rank_rank": min(model.low_rank_rank, 5),
        "local_window_size": 6 if isinstance(model.local_window_size, int) else (6, 14),
        "global_tokens": min(model.global_tokens, 3),
        "num_experts": 4,
        "expert_ffn_size": None if model.expert_ffn_size is None else 16,
        "first_dense_layers": min(model.first_dense_layers, 1),
        "capacity_factor": None,  # what experts drop of a sequence depends on all of it
    }
    return model.model_copy(update={**small, **changes})


def shipped_sections() -> list:
    """(name, section) of every shipped config with the default block and with the transformer's."""
    sections = []
    for path in CONFIGS:
        section = load_config(path).model
        sections += [(f"{path.stem}-{block}", scaled_down(section, block=block)) for block in ("phase8", "transformer")]
    return sections


SHIPPED = shipped_sections()
VARIANTS = [
    *SHIPPED,
    *(
        (f"score-{score}-chain-{chain}", scaled_down(ModelSection(score=score, chain=chain, convolution_size=taps, global_tokens=3)))
        for score, chain, taps in (("dot", "none", 1), ("dot", "decay", 4), ("lorentz", "gate", 4), ("lorentz", "both", 4), ("dot", "both", 2))
    ),
    *((f"window-{score}", scaled_down(ModelSection(score=score, global_path="none", global_tokens=3))) for score in ("dot", "lorentz")),
    *(
        (f"delta-chain-{chain}", scaled_down(ModelSection(global_path="delta", chain=chain, low_rank_rank=rank, global_tokens=2)))
        for chain, rank in (("none", 0), ("decay", 0), ("gate", 0), ("both", 5))
    ),
    *(
        (f"gate-channel-{path}-chain-{chain}", scaled_down(ModelSection(global_path=path, global_gate="channel", chain=chain, low_rank_rank=rank)))
        for path, chain, rank in (("delta", "none", 0), ("linear", "decay", 5), ("delta", "both", 0))
    ),
    *(
        (f"decay-floor-{path}-chain-{chain}", scaled_down(ModelSection(global_path=path, decay_floor=-5.0, chain=chain)))
        for path, chain in (("delta", "none"), ("linear", "none"), ("delta", "both"))
    ),
    ("qk-norm-delta", scaled_down(ModelSection(global_path="delta", local_qk_norm=True, global_tokens=2))),
    ("qk-norm-window", scaled_down(ModelSection(global_path="none", local_qk_norm=True, convolution_size=1))),
    ("qk-norm-transformer", scaled_down(ModelSection(block="transformer", local_qk_norm=True))),
    *(
        (f"silu-{path}-{taps}", scaled_down(ModelSection(global_path=path, global_activation="silu", convolution_size=taps, local_qk_norm=norm)))
        for path, taps, norm in (("delta", 4, False), ("delta", 1, True), ("linear", 4, False))
    ),
    (
        "gated-deltanet",
        scaled_down(
            ModelSection(global_path="delta", global_activation="silu_with_values", global_gate_activation="silu"), local_window_size=(0, 6)
        ),
    ),
    (
        "mamba2",
        scaled_down(ModelSection(global_activation="silu_with_values", global_gate_activation="silu", global_skip=True), local_window_size=(0, 6)),
    ),
    (
        "silu-and-skip-beside-a-window",
        scaled_down(
            ModelSection(chain="gate", global_gate="scalar", global_activation="silu_with_values", global_gate_activation="silu", low_rank_rank=5),
            global_skip=True,
        ),
    ),
    ("values", scaled_down(ModelSection(value_activation="silu", global_gate_activation="silu"))),
    ("values-low-rank-delta", scaled_down(ModelSection(value_activation="silu", global_path="delta", low_rank_rank=5), global_tokens=2)),
    ("values-transformer", scaled_down(ModelSection(block="transformer", value_activation="silu", convolution_size=4))),
    ("embedding-scalars", scaled_down(ModelSection(chain="gate", tie_embeddings=True), num_layers=3, embedding_scalars=True)),
    ("embedding-scalars-transformer", scaled_down(ModelSection(block="transformer", convolution_size=4), embedding_scalars=True)),
    ("embedding-scalars-experts", scaled_down(ModelSection(ffn="moe", embedding_scalars=True, global_path="delta"))),
    ("positions-in-turns", scaled_down(ModelSection(), num_layers=3, rotary=(True, False))),
    ("transformer-without-positions", scaled_down(ModelSection(block="transformer", rotary=False))),
    ("windows", scaled_down(ModelSection(), num_layers=3, local_window_size=(3, 9), global_tokens=2, memory_tokens=(4.0, 90.0))),
    ("hybrid-delta", scaled_down(ModelSection(global_path="delta"), num_layers=3, local_window_size=(0, 5, 0), global_tokens=2)),
    ("recurrence-alone", scaled_down(ModelSection(chain="both", score="lorentz"), local_window_size=0)),
    (
        "transformer-grouped",
        scaled_down(ModelSection(block="transformer", num_kv_heads=2, convolution_size=4, local_qk_norm=True, rope_scaling=LLAMA3)),
    ),
    (
        "transformer-one-head-of-keys",
        scaled_down(ModelSection(block="transformer", num_kv_heads=1, low_rank_rank=5, rope_scaling=RopeScaling(type="linear", factor=3.0))),
    ),
    ("transformer-convolution", scaled_down(ModelSection(block="transformer", convolution_size=4))),
    *(
        (f"experts-{score}-{shared}-{block}", scaled_down(ModelSection(ffn="moe", router_score=score, shared_experts=shared, top_k=k, block=block)))
        for score, shared, k, block in (("softmax", 0, 2, "phase8"), ("sigmoid", 1, 3, "phase8"), ("softmax", 2, 1, "transformer"))
    ),
    ("experts-scaled", scaled_down(ModelSection(ffn="moe", routed_scaling_factor=2.5))),
    ("experts-in-turns", scaled_down(ModelSection(ffn="moe"), num_layers=3, first_dense_layers=0, moe_every_n_layers=2)),
    ("low-rank", scaled_down(ModelSection(low_rank_rank=5, ffn="low_rank_swiglu", tie_embeddings=True))),
]
VARIANT_IDS = [name for name, _ in VARIANTS]
VARIANT_SECTIONS = [section for _, section in VARIANTS]


def perturbed_model(section: ModelSection, *, dtype: torch.dtype = torch.float64, context: Axis = ALONE) -> LanguageModel:
    """A model whose zero-initialised weights have been moved off zero, so that nothing behind them is hidden."""
    model = build_model(section, dtype=dtype, device=torch.device("cpu"), context=context)
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def random_tokens(batch: int = 2, length: int = LENGTH, vocab_size: int = 61) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(2))


def document_starts(*begins: int, batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    starts = torch.zeros(batch, length, dtype=torch.bool)
    starts[:, list(begins)] = True
    return starts
