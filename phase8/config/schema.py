"""The whole configurable surface: frozen models, one per section, one field per YAML key; that of the model is in `model_section.py`.

A YAML key, the field and the variable in the code carry the same name. `description` is what `launch/pretrain.py --help` prints.
Rules about one field are part of its type, see `values.py`; rules across fields and sections, and keys that are declared but not
implemented yet, are in `validate.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from phase8.config.model_section import ModelSection
from phase8.config.section import Section, key
from phase8.config.values import (
    Fraction,
    LayerCount,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    PositiveNumber,
    ProcessCount,
    RankCount,
    Seconds,
    SequenceCount,
    Text,
    TokenCount,
    bf16_is_the_dtype,
)

# The value of a setting that is chosen automatically, see auto.py.
Auto = Literal["auto"]
# Projects whose .idx files share one layout but number dtypes differently.
Dialect = Literal["megatron", "deepspeed", "gpt-neox", "nanotron"]


class RunSection(Section):
    """Where the run lives: everything it writes is under `<output_dir>/<name>`."""

    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = key("run", "name of the run and of its directory")
    output_dir: PathText = key("runs", "parent of the run directory")


class DataSource(Section):
    """One data set of a blend."""

    path: PathText = Field(description=".bin/.idx prefix")
    weight: PositiveNumber = Field(description="share of the samples; only the ratios matter")
    dialect: Dialect | None = key(None, "project that wrote the pair, where its type code is ambiguous")


Blend = Annotated[tuple[DataSource, ...], Field(min_length=1, strict=False)]
TokenIds = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1, strict=False)]


class DataSection(Section):
    """Training text, tokenizer and loader."""

    train: PathText | Blend | None = key(None, ".bin/.idx prefix or pattern, or a blend of several; null: the embedded corpus (Python's library)")
    validation: PathText | Blend | None = key(None, "the same for evaluation; null: none (embedded corpus: its fixed held-out split)")
    tokenizer: PathText | None = key(None, "sentencepiece .model or Hugging Face tokenizer.json; copied into checkpoints, needed to generate")
    eod_token: Text | None = key(None, "piece of the tokenizer between documents; null: the one it names itself")
    begin_token: Text | None = key(
        None, "piece before a text to continue or to evaluate, of a model made elsewhere that knows one; null: eod_token, as documents are packed"
    )
    end_ids: TokenIds | None = key(None, "token ids that end a text to continue, of a model made elsewhere, beside eod_token; null: none")
    begin_id: NonNegativeInt | None = key(None, "token id that begins a text, of a model made elsewhere without a tokenizer; kept for an export")
    padding_id: NonNegativeInt | None = key(None, "the same for places without text")
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
    context_parallel_size: RankCount = key(1, "ranks that share each sequence, a slice each")
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
    engine: Literal["fsdp", "deepspeed"] = key("fsdp", "who implements the stages; deepspeed: stages 1 to 3, with data and tensor parallelism")
    shard_size: PositiveInt | None = key(None, "data-parallel ranks that share one copy, a node's for example; null: all of them (stage 0: 1)")
    offload_optimizer: Literal["none", "cpu", "nvme"] = key("none", "where optimizer states live between steps; nvme: deepspeed only")
    offload_params: Literal["none", "cpu", "nvme"] = key("none", "where parameters live between uses")
    offload_gradients: bool = key(
        False, "beside offloaded parameters: sums of gradients over microbatches in host memory too, 4 bytes a parameter less on the device"
    )
    nvme_path: PathText | None = key(None, "directory on an NVMe disk of every host for what is offloaded to nvme; emptied at the end")
    gather_dtype: Literal["fp32"] | None = key(
        None, "dtype in which stage 3 gathers the matrices of blocks; null: that of precision.dtype, to which layers round them anyway"
    )
    copy_engine_gather: bool = key(
        False, "blocks are gathered by copy engines, beside all processors of the GPU; GPUs of one NVLink domain share, no effect on a CPU"
    )


class PrecisionSection(Section):
    """Number formats. Master weights, gradients, reductions, norms and the Green chain are fp32 in every mode."""

    dtype: Literal["bf16", "fp32"] = key("bf16", "format of matmuls and of the residual stream")
    linear: Annotated[Literal["bf16", "fp8", "int8"] | None, AfterValidator(bf16_is_the_dtype)] = key(
        None, "format of the products of dense linear layers in blocks; null, or bf16: that of precision.dtype; int8: refused, with what was measured"
    )
    fp8_scaling: Literal["row", "tensor"] = key("tensor", "what numbers of fp8 share a scale: a row of a factor, or all of it")
    bf16_layers: int = Field(default=1, ge=0, description="blocks at either end of the model whose products stay in precision.dtype")

    def fp8_layers(self, num_layers: int) -> range:
        """The layers of a model whose linear layers compute in fp8."""
        return range(0) if self.linear is None else range(self.bf16_layers, num_layers - self.bf16_layers)
    tf32: bool = key(True, "let fp32 matmuls use tf32 on GPUs that have it")


class OptimSection(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "muon"] = key("adamw", "optimizer; muon: for the matrices of linear layers in blocks, with adamw for all else")
    learning_rate: PositiveFloat = key(6e-4, "peak learning rate")
    min_learning_rate_ratio: Fraction = key(0.1, "final learning rate over the peak")
    schedule: Literal["cosine", "wsd", "constant"] = key("cosine", "shape after the warmup; wsd: stable, then linear decay")
    warmup_steps: NonNegativeInt = key(100, "steps of linear warmup")
    decay_steps: PositiveInt | None = key(None, "steps of the final decay of wsd; null: a tenth of num_steps")
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = key((0.9, 0.95), "AdamW betas")
    eps: PositiveFloat = key(1e-8, "AdamW epsilon")
    state_dtype: Literal["fp32", "bf16", "fp8"] = key(
        "fp32", "dtype of the moments that adamw keeps of matrices; bf16 and fp8 (eight bits, the first as its ratio to the root of the second): "
        "rounded at random, right on average"
    )
    momentum: Fraction = key(0.95, "of muon, after its warmup from 0.85")
    momentum_warmup_steps: NonNegativeInt = key(300, "steps in which the momentum of muon rises; 0: none")
    weight_decay: NonNegativeFloat = key(0.1, "decay of matrices; vectors, norms and embeddings have none")
    gradient_clip_norm: NonNegativeFloat = key(1.0, "largest global gradient norm; 0: no clipping")

    def final_decay_steps(self, num_steps: int) -> int:
        """Number of steps of the final decay of wsd in a schedule of `num_steps`."""
        return self.decay_steps if self.decay_steps is not None else max(num_steps // 10, 1)


class CompileSection(Section):
    """torch.compile of each block."""

    enabled: bool | Auto = key("auto", "compile the blocks")
    mode: Literal["default", "max-autotune"] = key("default", "torch.compile mode; CUDA graphs: train.cuda_graphs")
    backend: str | None = key(None, "compiler behind torch.compile, by the name under which an extension registers it; null: torch's own")
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
    recompute: Literal["auto", "none", "full", "slices", "selective", "budget"] = key(
        "auto",
        "activations recomputed in backward: none, whole blocks, whole blocks slice by slice of the sequence, the mixer only, or what torch.compile "
        "chooses; auto also sets activation_memory_budget and recompute_every_n_layers",
    )
    recompute_slice_tokens: TokenCount = key(
        16384, "recompute slices: tokens of a slice; beside the residual stream, activations take no more memory than those of one slice"
    )
    activation_memory_budget: Annotated[float, Field(ge=0, le=1)] = key(
        0.5, "recompute budget: share of their activations that blocks may keep; 0: their inputs only"
    )
    recompute_every_n_layers: PositiveInt = key(1, "recompute layers 0, n, 2n, ...")
    offload_activations: Literal["none", "cpu"] = key(
        "none", "where what is kept of blocks recomputed whole or in slices, their inputs, waits for backward; cpu: in host memory"
    )
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
        every = f" every {self.recompute_every_n_layers} layers" if self.recompute_every_n_layers > 1 else ""
        return self.recompute + budget + every + (", inputs in host memory" if self.offload_activations == "cpu" else "")


class CheckpointSection(Section):
    """When checkpoints are saved, which are kept, and where the first weights come from."""

    every_n_steps: NonNegativeInt = key(500, "steps between saves; 0: only at the end and when interrupted")
    asynchronous: bool | Auto = key("auto", "train on while a copy in host memory is written; the last save of a run is awaited")
    keep_last: PositiveInt = key(3, "newest checkpoints kept")
    keep_every_n_steps: PositiveInt | None = key(None, "also keep every checkpoint whose step is a multiple of this")
    initialise_from: PathText | None = key(
        None, "first weights of a new run: a checkpoint, a run, consolidated weights or Hugging Face's form; null: random ones from the seed"
    )


class ObserveSection(Section):
    """What the run shows and records."""

    log_every_n_steps: PositiveInt = key(10, "steps between printed lines when the output is not a terminal")
    stragglers_every_n_steps: NonNegativeInt = key(100, "steps between looks for the slowest of several ranks; 0: never")
    tensorboard: bool = key(True, "write TensorBoard events")
    wandb: Literal["none", "online", "offline"] = key("none", "log to Weights & Biases, or into the run directory for `wandb sync`")
    wandb_entity: Text | None = key(None, "user or team that owns the run in wandb; null: the account's default")
    trackio: bool = key(False, "log to trackio's local data base")
    project: Text = key("phase8", "project of the run in wandb and trackio")
    openmetrics: PathText | None = key(None, "file of latest figures for the textfile collector of Prometheus' node exporter, *.prom; null: none")
    report: bool = key(True, "draw report/loss.png and report/index.html when the run ends")
    sample_prompt: Text | None = key(None, "prompt of a sample printed at the end; null: none")
    sample_tokens: TokenCount = key(100, "tokens of that sample")
    sample_at_evaluations: bool = key(False, "also sample at every evaluation, for the report; several ranks gather the whole model for it")
    profile_at_step: PositiveInt | None = key(
        None, "step whose kernels every rank records, as a table and a trace for Perfetto in profile/; null: none"
    )
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
