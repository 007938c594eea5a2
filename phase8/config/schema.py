"""The whole configurable surface: frozen models, one per section, one field per YAML key.

A YAML key, the field and the variable in the code carry the same name. `description` is what `launch/pretrain.py --help` prints.
Rules about one field are part of its type, see `values.py`; rules across fields and sections, and keys that are declared but not
implemented yet, are in `validate.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from phase8.config.values import (
    Fraction,
    GlobalPathName,
    LayerCount,
    NegativeFloat,
    NonNegativeFloat,
    NonNegativeInt,
    OptionalWidth,
    PathText,
    PositiveFloat,
    PositiveInt,
    PositiveNumber,
    ProcessCount,
    RankCount,
    Seconds,
    SequenceCount,
    TapCount,
    Text,
    TokenCount,
    Width,
)

_Value = TypeVar("_Value")
# The value of a setting that is chosen automatically, see auto.py.
Auto = Literal["auto"]
# Projects whose .idx files share one layout but number dtypes differently.
Dialect = Literal["megatron", "deepspeed", "gpt-neox", "nanotron"]


def key(default: Any, description: str) -> Any:
    """A documented config key."""
    return Field(default=default, description=description)


class Section(BaseModel):
    """Base of every section: immutable, unknown keys forbidden, no silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class RunSection(Section):
    """Where the run lives: everything it writes is under `<output_dir>/<name>`."""

    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = key("run", "name of the run and of its directory")
    output_dir: PathText = key("runs", "parent of the run directory")


Windows = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1, strict=False)]
Switches = Annotated[tuple[bool, ...], Field(min_length=1, strict=False)]


class ModelSection(Section):
    """The model. Shapes follow docs: H * K = attention width, K = head size."""

    block: Literal["phase8", "transformer"] = key("phase8", "phase8, or the full causal attention baseline")
    d_model: Width = key(512, "width D of the residual stream")
    num_layers: LayerCount = key(8, "number of blocks")
    num_heads: Width = key(8, "number of heads H")
    head_size: Width | None = key(None, "size K of a head, even; null: d_model / num_heads")
    vocab_size: TokenCount = key(16384, "number of token ids; the tokenizer and the data must stay below it")
    sequence_length: TokenCount = key(512, "tokens T of a training sequence")
    low_rank_rank: OptionalWidth = key(0, "rank R of the mixer's linears (and of the feed-forward's with ffn: low_rank_swiglu); 0: dense")
    local_window_size: NonNegativeInt | Windows = key(
        (128, 128, 128, 1024),
        "window W of the local path, in tokens, the token itself included; a list is repeated over the layers. 0: the layer is the global path "
        "alone; then the layers that have a window are windows alone",
    )
    global_tokens: NonNegativeInt = key(0, "first G tokens of the sequence that every later token sees")
    score: Literal["lorentz", "dot"] = key("dot", "score of the local path: hyperbolic distance or scaled dot product")
    local_qk_norm: bool = key(
        False, "queries and keys of the window (transformer: of the attention) are normalised and scaled by a learned number per head; dot score only"
    )
    global_path: GlobalPathName = key(
        "linear",
        "recurrence beside the window: delta replaces what a key holds, linear adds to it; none: the window alone, without gate and chain",
    )
    chain: Literal["both", "decay", "gate", "none"] = key("none", "what the Green chain modulates: the decay, the gate, both, or no chain")
    global_gate: Literal["scalar", "channel"] = key(
        "scalar", "gate of the global path: a number per head and token, or one per channel, by a low-rank product whose rank is the head size"
    )
    global_activation: Literal["none", "silu"] = key(
        "none", "activation of the global path's queries and keys, between convolution and normalisation"
    )
    decay_floor: NegativeFloat | None = key(
        None, "lowest logarithm of the global path's decay, which is the floor times a sigmoid, -5 for example; null: minus a softplus, without floor"
    )
    memory_tokens: Annotated[tuple[PositiveFloat, PositiveFloat], Field(strict=False)] = key(
        (2.0, 500.0), "tokens that the first and the last head of the global path remember at initialisation; on a logarithmic scale between"
    )
    convolution_size: TapCount | None = key(None, "taps of the causal convolution on q, k, v; 1: none; null: 4 (phase8), 1 (transformer)")
    ffn: Literal["swiglu", "low_rank_swiglu", "moe"] = key("swiglu", "feed-forward of the block")
    ffn_size: Width | None = key(None, "width F of the feed-forward; null: 8/3 d_model rounded up to a multiple of 64")
    tie_embeddings: bool = key(False, "use the embedding as the output head")
    rotary: bool | Switches = key(
        True, "rotary positions of the window's queries and keys (transformer: of the attention's); a list is repeated over the layers"
    )
    rope_base: PositiveFloat = key(10000.0, "base of the rotary frequencies")
    norm_eps: PositiveFloat = key(1e-5, "epsilon of every RMS norm")
    init_std: PositiveFloat = key(0.02, "standard deviation of the initial weights")

    @property
    def head_width(self) -> int:
        """Size K of one head."""
        return self.head_size if self.head_size is not None else self.d_model // self.num_heads

    @property
    def attention_width(self) -> int:
        """Width H * K of q, k and v."""
        return self.num_heads * self.head_width

    @property
    def window_sizes(self) -> tuple[int, ...]:
        """Window of the local path in each layer."""
        return _over_layers(self.local_window_size, self.num_layers)

    @property
    def has_rotary(self) -> tuple[bool, ...]:
        """Whether queries and keys of each layer have rotary positions."""
        return _over_layers(self.rotary, self.num_layers)

    def of_window(self, window: int) -> ModelSection:
        """The section of the layers that have this window: where others have none, these layers leave the global path to them."""
        alternates = window > 0 and 0 in self.window_sizes
        return self.model_copy(update={"local_window_size": window} | ({"global_path": "none"} if alternates else {}))

    @property
    def has_global_path(self) -> bool:
        """Whether the blocks have a global path beside the local one."""
        return self.block == "phase8" and self.global_path != "none"

    @property
    def scalars_per_head(self) -> int:
        """Numbers that the global path computes for each head and token: decay step, scalar gate, potential of the chain, share of the delta rule."""
        if not self.has_global_path:
            return 0
        return 1 + (self.global_gate == "scalar") + (self.chain != "none") + (self.global_path == "delta")

    @property
    def feed_forward_rank(self) -> int:
        """Rank of the feed-forward's low-rank pairs; 0: full matrices."""
        return self.low_rank_rank if self.ffn == "low_rank_swiglu" else 0

    @property
    def feed_forward_width(self) -> int:
        """Width F of the feed-forward."""
        return self.ffn_size if self.ffn_size is not None else -(-8 * self.d_model // (3 * 64)) * 64

    @property
    def convolution_taps(self) -> int:
        """Taps of the causal convolution on q, k and v."""
        if self.convolution_size is not None:
            return self.convolution_size
        return 4 if self.block == "phase8" else 1


def _over_layers(value: _Value | tuple[_Value, ...], num_layers: int) -> tuple[_Value, ...]:
    """The value of each layer; a list is repeated."""
    pattern = value if isinstance(value, tuple) else (value,)
    return tuple(pattern[layer % len(pattern)] for layer in range(num_layers))


class DataSource(Section):
    """One data set of a blend."""

    path: PathText = Field(description=".bin/.idx prefix")
    weight: PositiveNumber = Field(description="share of the samples; only the ratios matter")
    dialect: Dialect | None = key(None, "project that wrote the pair, where its type code is ambiguous")


Blend = Annotated[tuple[DataSource, ...], Field(min_length=1, strict=False)]


class DataSection(Section):
    """Training text, tokenizer and loader."""

    train: PathText | Blend | None = key(None, ".bin/.idx prefix or pattern, or a blend of several; null: the embedded corpus (Python's library)")
    validation: PathText | Blend | None = key(None, "the same for evaluation; null: none (embedded corpus: its fixed held-out split)")
    tokenizer: PathText | None = key(None, "sentencepiece .model or Hugging Face tokenizer.json; copied into checkpoints, needed to generate")
    eod_token: Text | None = key(None, "piece of the tokenizer between documents; null: the one it names itself")
    cache_dir: PathText = key(".cache/phase8", "where the embedded corpus and the ids of other projects' data are kept")
    reset_at_document_boundaries: bool = key(False, "packed documents do not see each other: state, window and loss stop at the boundary")
    allow_fingerprint_change: bool = key(False, "train although data, order or tokenizer are not the checkpoint's, or the data not the tokenizer's")
    num_workers: ProcessCount | Auto = key("auto", "loader processes; 0: load in the training process, where the next two keys have no effect")
    split: Text | None = key(None, "shares of the documents of data.train for training, validation and neither, as 969,30,1; null: all for training")
    ignore_sequence_modes: bool = key(False, "train on pairs with a mode per sequence (multimodal data) as plain text")
    prefetch_factor: PositiveInt = key(2, "microbatches each worker prepares ahead, at least; together they prepare no fewer than a step reads")
    persistent_workers: bool = key(True, "keep the workers of evaluations alive between them")
    pin_memory: bool | Auto = key("auto", "page-locked host memory for faster copies to the GPU; no effect on the CPU")


class ParallelSection(Section):
    """The rank grid. data_parallel_size is the world size divided by the other degrees."""

    tensor_parallel_size: RankCount = key(1, "ranks that share each layer's heads and columns")
    pipeline_parallel_size: RankCount = key(1, "stages the layers are divided over")
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved"] = key("1f1b", "order of forwards and backwards; interleaved needs chunks")
    pipeline_chunks: LayerCount = key(1, "pieces of the model per stage, for the interleaved schedule")
    context_parallel_size: RankCount = key(1, "ranks that share each sequence")
    expert_parallel_size: RankCount = key(1, "ranks that share the experts; divides data_parallel_size")
    async_tensor_parallel: bool = key(
        False, "tokens are exchanged beside the products that need or make them; GPUs of one NVLink domain, no effect on a CPU"
    )
    sequence_parallel: bool = key(True, "shard the sequence between tensor-parallel regions; always on with tensor parallelism")
    num_microbatches: SequenceCount | None = key(None, "gradient accumulation steps; null: from the batch sizes")
    timeout_seconds: Seconds = key(600.0, "how long ranks may take to meet, or stay at one place, before the run ends and names who hangs")


class ZeroSection(Section):
    """Sharding of optimizer, gradients and parameters over data-parallel ranks."""

    stage: Annotated[int, Field(ge=0, le=3)] = key(0, "0: replicate; 1: shard optimizer; 2: and gradients; 3: and parameters")
    engine: Literal["fsdp", "deepspeed"] = key("fsdp", "who implements the stages")
    shard_size: PositiveInt | None = key(None, "data-parallel ranks that share one copy, a node's for example; null: all of them (stage 0: 1)")
    offload_optimizer: Literal["none", "cpu", "nvme"] = key("none", "where optimizer states live between steps")
    offload_params: Literal["none", "cpu", "nvme"] = key("none", "where parameters live between uses")
    copy_engine_gather: bool = key(
        False, "blocks are gathered by copy engines, beside all processors of the GPU; GPUs of one NVLink domain share, no effect on a CPU"
    )


class PrecisionSection(Section):
    """Number formats. Master weights, gradients, reductions, norms and the Green chain are fp32 in every mode."""

    dtype: Literal["bf16", "fp32", "fp8", "int8"] = key("bf16", "format of matmuls and of the residual stream")
    tf32: bool = key(True, "let fp32 matmuls use tf32 on GPUs that have it")


class OptimSection(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "muon"] = key("adamw", "optimizer")
    learning_rate: PositiveFloat = key(6e-4, "peak learning rate")
    min_learning_rate_ratio: Fraction = key(0.1, "final learning rate over the peak")
    schedule: Literal["cosine", "wsd", "constant"] = key("cosine", "shape after the warmup; wsd: stable, then linear decay")
    warmup_steps: NonNegativeInt = key(100, "steps of linear warmup")
    decay_steps: PositiveInt | None = key(None, "steps of the final decay of wsd; null: a tenth of num_steps")
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = key((0.9, 0.95), "AdamW betas")
    eps: PositiveFloat = key(1e-8, "AdamW epsilon")
    weight_decay: NonNegativeFloat = key(0.1, "decay of matrices; vectors, norms and embeddings have none")
    gradient_clip_norm: NonNegativeFloat = key(1.0, "largest global gradient norm; 0: no clipping")

    def final_decay_steps(self, num_steps: int) -> int:
        """Number of steps of the final decay of wsd in a schedule of `num_steps`."""
        return self.decay_steps if self.decay_steps is not None else max(num_steps // 10, 1)


class CompileSection(Section):
    """torch.compile of each block."""

    enabled: bool | Auto = key("auto", "compile the blocks")
    mode: Literal["default", "max-autotune"] = key("default", "torch.compile mode; CUDA graphs: train.cuda_graphs")
    fullgraph: bool = key(False, "fail on a graph break instead of splitting the graph")


class AnomalySection(Section):
    """Handling of steps whose loss or gradient is not finite, or whose loss spikes. Their update is always skipped."""

    policy: Literal["skip", "rollback", "stop"] = key(
        "skip", "go on with the next samples; go back to the newest checkpoint and leave out the samples since; end the run"
    )
    spike_deviations: PositiveFloat | None = key(
        None, "a loss so many standard deviations above the median of the last 64 is a spike; null: only what is not finite counts"
    )
    max_consecutive: PositiveInt = key(10, "stop after so many such steps in a row, or rollbacks to the same checkpoint")


class TrainSection(Section):
    """Length of the run, batch, seed and recomputation."""

    global_batch_size: SequenceCount | None = key(32, "sequences per optimizer step; null: from the other two and the data-parallel size")
    tuning: Literal["measure", "plan", "off"] = key(
        "measure",
        "how settings that are auto are chosen: by a few real steps of the best that fit, by the plan alone, or not at all (nothing recomputed, "
        "compiled or recorded)",
    )
    device_memory_gib: PositiveFloat | None = key(None, "memory of each GPU that the run may take, in GiB; null: what is free")
    micro_batch_size: SequenceCount | Auto | None = key(
        "auto", "sequences per forward; auto: the fastest that fits; null: from num_microbatches, else global_batch_size"
    )
    num_steps: PositiveInt = key(1000, "optimizer steps; sets the length of the schedules")
    stop_at_step: PositiveInt | None = key(None, "save and stop after this step without changing the schedules")
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = key(1234, "seed of initial weights and data order")
    deterministic: bool = key(False, "refuse operations without a deterministic implementation")
    evaluate_every_n_steps: NonNegativeInt = key(100, "steps between evaluations; 0: never")
    evaluation_sequences: SequenceCount = key(256, "sequences of an evaluation, always the same ones")
    recompute: Literal["auto", "none", "full", "selective", "budget"] = key(
        "auto",
        "activations recomputed in backward: none, whole blocks, the mixer only, or what torch.compile chooses; auto also sets the next two keys",
    )
    activation_memory_budget: Annotated[float, Field(ge=0, le=1)] = key(
        0.5, "recompute budget: share of their activations that blocks may keep; 0: their inputs only"
    )
    recompute_every_n_layers: PositiveInt = key(1, "recompute layers 0, n, 2n, ...")
    kernels: Literal["auto", "reference"] = key(
        "auto", "Triton kernels where GPU and toolchain allow, or the plain torch references everywhere"
    )
    check_replicas_every_n_steps: NonNegativeInt = key(1000, "steps between comparisons of what several ranks hold alike; 0: never")
    anomaly: AnomalySection = key(AnomalySection(), "steps whose loss or gradient must not count")
    compile: CompileSection = key(CompileSection(), "torch.compile")
    cuda_graphs: bool | Auto = key("auto", "every rank replays its whole step as one CUDA graph; no pipeline, no offloading; ignored on a CPU")

    @property
    def recomputation(self) -> str:
        """The recomputation in words."""
        budget = f" {self.activation_memory_budget:g}" if self.recompute == "budget" else ""
        return self.recompute + budget + (f" every {self.recompute_every_n_layers} layers" if self.recompute_every_n_layers > 1 else "")


class CheckpointSection(Section):
    """When checkpoints are saved, which are kept, and where the first weights come from."""

    every_n_steps: NonNegativeInt = key(500, "steps between saves; 0: only at the end and when interrupted")
    asynchronous: bool | Auto = key("auto", "train on while a copy in host memory is written; the last save of a run is awaited")
    keep_last: PositiveInt = key(3, "newest checkpoints kept")
    keep_every_n_steps: PositiveInt | None = key(None, "also keep every checkpoint whose step is a multiple of this")
    initialise_from: PathText | None = key(
        None, "first weights of a new run: a checkpoint, a run, consolidated weights or a Hugging Face Llama; null: random ones from the seed"
    )


class ObserveSection(Section):
    """What the run shows and records."""

    log_every_n_steps: PositiveInt = key(10, "steps between printed lines when the output is not a terminal")
    stragglers_every_n_steps: NonNegativeInt = key(100, "steps between looks for the slowest of several ranks; 0: never")
    tensorboard: bool = key(True, "write TensorBoard events")
    report: bool = key(True, "draw report/loss.png and report/index.html when the run ends")
    sample_prompt: Text | None = key(None, "prompt of a sample printed at the end; null: none")
    sample_tokens: TokenCount = key(100, "tokens of that sample")
    peak_flops: PositiveFloat | None = key(None, "FLOP/s of the device that count as MFU 1; null: known GPUs, else no MFU")


class RunConfig(Section):
    """A complete run."""

    run: RunSection = key(RunSection(), "")
    model: ModelSection = key(ModelSection(), "")
    data: DataSection = key(DataSection(), "")
    parallel: ParallelSection = key(ParallelSection(), "")
    zero: ZeroSection = key(ZeroSection(), "")
    precision: PrecisionSection = key(PrecisionSection(), "")
    optim: OptimSection = key(OptimSection(), "")
    train: TrainSection = key(TrainSection(), "")
    checkpoint: CheckpointSection = key(CheckpointSection(), "")
    observe: ObserveSection = key(ObserveSection(), "")
