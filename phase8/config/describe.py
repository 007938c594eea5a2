"""Describes the schema in words: every key with its type, default and meaning, for `--help` and for error sentences."""

from __future__ import annotations

import difflib
import reprlib
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import AfterValidator, BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from phase8.config.schema import RunConfig
from phase8.config.section import Section
from phase8.config.values import AS_PATH

_MAX_SHOWN = 400
_shown = reprlib.Repr()
_shown.maxlevel = 4
_shown.maxlist = _shown.maxtuple = _shown.maxdict = 10
_shown.maxstring = _shown.maxother = 200

# Names of keys in other projects (Megatron-LM, Hugging Face, nanoGPT, torchtitan), where the spelling alone would not lead to the key.
FOREIGN_NAMES = {
    "data.end_ids": "eos_token_id eos_token_ids stop_token_ids",
    "data.num_workers": "dataloader_num_workers workers",
    "data.tokenizer": "tokenizer_model tokenizer_path vocab_file",
    "data.train": "data_path train_data train_data_path dataset dataset_path data_dir",
    "data.validation": "valid_data_path val_data validation_data eval_dataset",
    "checkpoint.every_n_steps": "save_interval save_steps save_every",
    "checkpoint.keep_last": "save_total_limit",
    "model.d_model": "n_embd hidden_size dim d_embed embed_dim",
    "model.ffn_size": "intermediate_size ffn_hidden_size d_ff hidden_dim",
    "model.head_size": "head_dim kv_channels d_head",
    "model.init_std": "initializer_range init_method_std",
    "model.local_window_size": "sliding_window window_size window",
    "model.norm_eps": "rms_norm_eps layernorm_epsilon norm_epsilon",
    "model.num_heads": "n_head n_heads nhead num_attention_heads",
    "model.routed_scaling_factor": "moe_router_topk_scaling_factor route_scale",
    "model.balance_loss_weight": "moe_aux_loss_coeff router_aux_loss_coef aux_loss_alpha",
    "model.capacity_factor": "moe_expert_capacity_factor expert_capacity_factor",
    "model.expert_ffn_size": "moe_intermediate_size moe_ffn_hidden_size expert_intermediate_size",
    "model.first_dense_layers": "first_k_dense_replace num_dense_layers",
    "model.moe_every_n_layers": "moe_layer_freq expert_interval",
    "model.num_experts": "num_local_experts n_routed_experts moe_num_experts n_experts",
    "model.router_z_loss_weight": "moe_z_loss_coeff router_z_loss_coef",
    "model.shared_experts": "n_shared_experts num_shared_experts",
    "model.top_k": "num_experts_per_tok moe_router_topk moe_top_k experts_per_token num_selected_experts",
    "model.num_kv_heads": "n_kv_head n_kv_heads num_key_value_heads num_query_groups kv_heads n_head_kv",
    "model.num_layers": "n_layer n_layers num_hidden_layers depth",
    "model.rope_base": "rope_theta rotary_base",
    "model.rope_scaling.factor": "rope_scaling_factor rotary_seq_len_interpolation_factor",
    "model.rope_scaling.high_frequency_factor": "high_freq_factor",
    "model.rope_scaling.low_frequency_factor": "low_freq_factor",
    "model.rope_scaling.original_sequence_length": "original_max_position_embeddings original_seq_len old_context_len",
    "model.rope_scaling.type": "rope_type use_rope_scaling use_scaled_rope",
    "model.sequence_length": "seq_len seq_length context_length block_size max_seq_len max_seq_length max_position_embeddings n_ctx n_positions",
    "model.tie_embeddings": "tie_word_embeddings",
    "observe.log_every_n_steps": "log_interval logging_steps log_every",
    "optim.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optim.eps": "adam_eps adam_epsilon epsilon",
    "optim.gradient_clip_norm": "grad_clip clip_grad max_grad_norm max_norm gradient_clipping gradient_clip_val",
    "optim.learning_rate": "lr max_lr peak_lr",
    "optim.min_learning_rate_ratio": "min_lr min_lr_ratio",
    "optim.name": "optimizer optim_name",
    "optim.schedule": "lr_scheduler lr_scheduler_type lr_decay_style",
    "optim.warmup_steps": "warmup warmup_iters lr_warmup_iters num_warmup_steps lr_warmup_steps",
    "optim.weight_decay": "wd",
    "parallel.context_parallel_size": "cp cp_size",
    "parallel.expert_parallel_size": "ep ep_size expert_model_parallel_size",
    "parallel.num_microbatches": "gradient_accumulation_steps grad_accum accumulation_steps accumulate_grad_batches",
    "parallel.pipeline_parallel_size": "pp pp_size pipeline_model_parallel_size",
    "parallel.tensor_parallel_size": "tp tp_size tensor_model_parallel_size",
    "run.output_dir": "out_dir save save_dir output_directory",
    "train.compile.enabled": "torch_compile use_compile",
    "train.evaluate_every_n_steps": "eval_interval eval_steps eval_every",
    "train.evaluation_sequences": "eval_iters",
    "train.global_batch_size": "bs batch_size train_batch_size",
    "train.micro_batch_size": "mbs per_device_train_batch_size device_batch_size",
    "train.num_steps": "max_steps max_iters train_iters train_steps total_steps iterations steps num_train_steps",
    "train.offload_activations": "cpu_checkpointing activation_offloading activation_offload enable_activation_offloading cpu_offloading_activations",
    "train.recompute": "activation_checkpointing gradient_checkpointing recompute_granularity",
    "zero.stage": "zero_stage zero_optimization",
}


def iterate_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the schema with its dotted name, in the order of the schema."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from iterate_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def describe_type(field: FieldInfo) -> str:
    """The values that a key takes, in words."""
    return _describe(field.annotation, field.metadata)


def describe_schema() -> str:
    """The whole surface as text: a line for each section, two for each key."""
    lines = []
    for section_name, section in RunConfig.model_fields.items():
        assert isinstance(section.annotation, type)
        lines.append(f"\n{section_name}: {section.annotation.__doc__}")
        for name, field in iterate_keys(section.annotation, f"{section_name}."):
            default = field.default if isinstance(field.default, str) else describe_value(field.default)
            lines.append(f"  {name} = {default}    [{describe_type(field)}]")
            lines.append(f"      {field.description}")
    return "\n".join(lines)


def describe_value(value: Any) -> str:
    """A value as YAML spells it; a long value is shortened to its beginning and end."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else shortened(_shown.repr(value))


def shortened(text: str) -> str:
    """A text; a very long one is shortened to its beginning and end."""
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN // 2]}...{text[-_MAX_SHOWN // 2 :]}"


def alternatives(annotation: Any) -> Iterator[Any]:
    """The types of which a value must have one, without further restrictions."""
    if get_origin(annotation) in (types.UnionType, Union):
        for part in get_args(annotation):
            yield from alternatives(part)
    elif get_origin(annotation) is Annotated:
        yield from alternatives(get_args(annotation)[0])
    else:
        yield annotation


def entry_section(field: FieldInfo) -> type[Section] | None:
    """The section that each entry of a key's list must be, if the key takes such a list."""
    lists = (get_args(kind)[0] for kind in alternatives(field.annotation) if get_origin(kind) is tuple)
    return next((kind for kind in lists if isinstance(kind, type) and issubclass(kind, Section)), None)


def section_names() -> str:
    """The names of the sections, as part of a sentence."""
    return ", ".join(RunConfig.model_fields)


def unknown_key(name: str) -> str:
    """The error sentence for an unknown name, with the nearest key."""
    keys = [key for key, _ in iterate_keys()]
    inside = [key for key in keys if key.startswith(f"{name}.")]
    if inside:
        return f"{name} is a section; give one of its keys, {inside[0]} for example."
    known = [*keys, *dict.fromkeys(key.rsplit(".", 1)[0] for key in keys)]
    # Most likely is the same last word in another section, then another project's name, then the nearest spelling.
    leaf = name.rsplit(".", 1)[-1]
    near = [key for key in known if key.rsplit(".", 1)[-1] == leaf]
    near += [key for key, foreign in FOREIGN_NAMES.items() if leaf.lower().replace("-", "_") in foreign.split()]
    near += difflib.get_close_matches(name, [key for key in known if not name.startswith(f"{key}.")], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the sections are {section_names()}."
    return f"unknown key {shortened(name)}; {hint}"


def _describe(annotation: Any, metadata: Sequence[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (types.UnionType, Union):
        # A key that takes whole numbers and other numbers takes "a number".
        parts = [part for part in arguments if part is not int or float not in arguments]
        return " or ".join("null" if part is types.NoneType else _describe(part, metadata) for part in parts)
    if origin is Annotated:
        return _describe(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in arguments) if len(arguments) > 1 else str(arguments[0])
    if origin is tuple and arguments[1:] == (...,):
        (kind, _) = arguments
        is_section = isinstance(kind, type) and issubclass(kind, Section)
        return "a list of " + ("{" + ", ".join(kind.model_fields) + "}" if is_section else f"values, each {_describe(kind, [])}")
    if origin is tuple:
        return f"a list of {len(arguments)} values, each {_describe(arguments[0], [])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a path" if AS_PATH in metadata else "a text"}
    return " ".join([words[annotation], " and ".join(_bounds(metadata))]).strip()


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for item in metadata:
        match item:
            case FieldInfo():
                yield from _bounds(item.metadata)
            case BeforeValidator() | AfterValidator():  # these have an error sentence of their own
                pass
            case annotated_types.Ge(ge=bound):
                yield f"at least {bound}"
            case annotated_types.Gt(gt=bound):
                yield f"above {bound}"
            case annotated_types.Lt(lt=bound):
                yield f"below {bound}"
            case annotated_types.Le(le=bound):
                yield f"at most {bound}"
            case _ if "pattern" in vars(item):
                yield "of letters, digits, '.', '_' and '-' that begins with a letter or a digit"
            case _ if "allow_inf_nan" in vars(item):
                yield "finite"
