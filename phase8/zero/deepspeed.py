"""DeepSpeed's config made from ours, and what DeepSpeed has to know of tensor parallelism.

| stage | in fp32 | in bf16 |
|---|---|---|
| 1 | ZeRO 1 | ZeRO 2: DeepSpeed's stage 1 in bf16 with sums of gradients in fp32 is another optimizer, which skips no step |
| 2, 3 | the same | the same |

In bf16 DeepSpeed computes with bf16 copies of all parameters, norms and scalars included, and updates fp32 master weights.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from phase8.config.batch import BatchShape
from phase8.config.schema import ZeroSection
from phase8.distributed.collectives import Axis, sum_over
from phase8.distributed.mesh import Mesh
from phase8.distributed.placement import placed_like
from phase8.errors import ConfigError
from phase8.zero.swap import Swap

# Numbers in a bucket in which gradients are summed, parameters are gathered ahead, and the optimizer updates offloaded ones. DeepSpeed's own are ten
# times as large, gigabytes of a small card; from here on transfers are at full speed.
BUCKET = 50_000_000
# Numbers of a flat buffer of offloaded states, which the optimizer updates at once.
OFFLOADED_GROUP = 2 * BUCKET
_NO_REPORTS = 2**31 - 1


def import_deepspeed() -> ModuleType:
    """Imports DeepSpeed, quietly.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    # torch deprecates what DeepSpeed calls for every bucket.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        module = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ConfigError(
            f"zero.engine is deepspeed, but DeepSpeed cannot be imported ({error}); install it with: pip install 'phase8[deepspeed]', or set "
            "zero.engine to fsdp."
        ) from error
    importlib.import_module("deepspeed.utils").logger.setLevel(logging.WARNING)
    # On a CPU it would first compile collectives of its own, for a minute.
    importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    return module


def deepspeed_config(
    zero: ZeroSection, shape: BatchShape, *, is_bf16: bool, gradient_clip_norm: float, is_on_gpu: bool, swap: Swap | None
) -> dict[str, Any]:
    """The config that DeepSpeed gets.

    Args:
        zero: ZeRO section of the config.
        shape: Shape of the batch.
        is_bf16: Whether the compute dtype is bf16.
        gradient_clip_norm: Largest global norm; 0: no clipping.
        is_on_gpu: Whether the model computes on a GPU.
        swap: Place for what is offloaded to NVMe; None: nothing is.
    """
    return {
        "train_micro_batch_size_per_gpu": shape.micro_batch_size,
        "gradient_accumulation_steps": shape.num_microbatches,
        "train_batch_size": shape.micro_batch_size * shape.num_microbatches * shape.data_parallel_size,
        "gradient_clipping": gradient_clip_norm,
        "bf16": {"enabled": is_bf16, "check_grad_overflow": is_bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": _zero_config(zero, is_bf16=is_bf16, is_on_gpu=is_on_gpu, swap=swap),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _NO_REPORTS,
    }


def _zero_config(zero: ZeroSection, *, is_bf16: bool, is_on_gpu: bool, swap: Swap | None) -> dict[str, Any]:
    def offload(where: str) -> dict[str, Any]:
        place = {"nvme_path": str(swap.directory)} if where == "nvme" and swap is not None else {}
        return {"device": where, "pin_memory": is_on_gpu, **place}

    stage = 2 if zero.stage == 1 and is_bf16 else zero.stage
    section: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": is_on_gpu and (stage == 3 or zero.offload_optimizer == "none"),
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "offload_optimizer": offload(zero.offload_optimizer),
    }
    if stage == 3:
        section |= {
            "offload_param": offload(zero.offload_params) | ({"buffer_size": swap.largest_parameter} if swap is not None else {}),
            "stage3_param_persistence_threshold": 0,  # blocks are gathered together, small parameters with them
            "memory_efficient_linear": False,  # it would replace F.linear in the whole process
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_max_live_parameters": 4 * BUCKET,
            "stage3_max_reuse_distance": 4 * BUCKET,
            "sub_group_size": OFFLOADED_GROUP if zero.offload_optimizer != "none" else 20 * BUCKET,
        }
    return section


class TensorParallelUnit:
    """The groups of ranks as DeepSpeed asks for them (`mpu`).

    Args:
        mesh: Mesh of the ranks, several of which share layers.
    """

    def __init__(self, mesh: Mesh):
        assert mesh.device_mesh is not None  # several ranks share layers
        self._tensor, self._data = mesh.device_mesh["tp"], mesh.device_mesh["shard"]

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that share layers."""
        return self._tensor.get_group()

    def get_model_parallel_rank(self) -> int:
        """The place of this rank among those that share layers."""
        return self._tensor.get_local_rank()

    def get_model_parallel_world_size(self) -> int:
        """The number of ranks that share layers."""
        return self._tensor.size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same part of the layers."""
        return self._data.get_group()

    def get_data_parallel_rank(self) -> int:
        """The place of this rank among those that hold the same part of the layers."""
        return self._data.get_local_rank()

    def get_data_parallel_world_size(self) -> int:
        """The number of ranks that hold the same part of the layers."""
        return self._data.size()


def make_plain(model: nn.Module, axis: Axis, *, prefix: str = "") -> dict[str, DTensor]:
    """Replaces the parameters that tensor-parallel ranks divide by plain ones with this rank's part, since DeepSpeed takes no DTensors.

    What every rank has whole sees only the tokens or the heads of its rank; its gradients are summed over the ranks as they come.

    Args:
        model: Model whose parameters may be DTensors over `axis`.
        axis: Axis of tensor parallelism.
        prefix: Beginning of the names in the result.

    Returns:
        The DTensors by parameter name, on the meta device; without tensor parallelism none.
    """
    divided: dict[str, DTensor] = {}
    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules(prefix=prefix):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                continue
            if parameter not in made:
                divided[f"{path}.{name}" if path else name] = placed_like(parameter.to_local().detach().to("meta"), parameter)
                made[parameter] = _plain(parameter, axis)
            setattr(module, name, made[parameter])
    return divided


def _plain(parameter: DTensor, axis: Axis) -> nn.Parameter:
    plain = nn.Parameter(parameter.to_local().detach())
    is_whole = parameter.placements[-1].is_replicate()
    plain.tensor_model_parallel = not is_whole  # type: ignore[attr-defined]  # DeepSpeed counts others on the first rank alone
    if is_whole:
        plain.register_hook(lambda gradient: sum_over(gradient.contiguous(), axis))
    return plain


def hold_parts(
    deepspeed: ModuleType, module: nn.Module, config: dict[str, Any], mpu: TensorParallelUnit | None, *, swapper: Any | None = None
) -> Any | None:
    """Frees all of a module's parameters but this rank's pieces, which lie where stage 3 keeps them; in stages 1 and 2 does nothing.

    Args:
        deepspeed: DeepSpeed.
        module: Module whose parameters are whole.
        config: DeepSpeed's config.
        mpu: What DeepSpeed knows of tensor parallelism.
        swapper: What the last call for the same model returned; a new one would delete the files of the modules before.

    Returns:
        What writes parameters to a disk; None: nothing does.
    """
    if config["zero_optimization"]["stage"] != 3:
        return None
    group = None if mpu is None else mpu.get_data_parallel_group()
    dtype = next(module.parameters()).dtype
    init = deepspeed.zero.Init(
        module, group, config_dict_or_path=config, mem_efficient_linear=False, dtype=dtype, mpu=mpu, param_swapper=swapper
    )
    return init.param_swapper


def register_outside_blocks(deepspeed: ModuleType, root: nn.Module, blocks: nn.Module) -> None:
    """Tells stage 3 that a block's parameters are gathered together, and all others with the root: embedding, last norm and head.

    Args:
        deepspeed: The module.
        root: Module that DeepSpeed calls.
        blocks: Its blocks.
    """
    for block in blocks.children():
        deepspeed.utils.set_z3_leaf_module(block, True)
    in_blocks = set(blocks.parameters())
    for parameter in root.parameters():
        if parameter not in in_blocks:
            deepspeed.zero.register_external_parameter(root, parameter)


def free_engine(engine: Any) -> None:
    """Removes an engine of DeepSpeed from all places that live as long as the process, so that its memory is freed with the last reference.

    Stage 3 keeps the root of every engine in a list, and arguments of a method, among them its object, in a cache.
    """
    engine.destroy()
    roots = importlib.import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK
    roots[:] = [root for root in roots if root is not engine.module]
    coordinator = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator").PartitionedParameterCoordinator
    method = coordinator._PartitionedParameterCoordinator__params_to_release
    for wrapped in (cell.cell_contents for cell in method.__closure__ or ()):
        if hasattr(wrapped, "cache_clear"):
            wrapped.cache_clear()
