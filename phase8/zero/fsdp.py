"""ZeRO by torch's FSDP2: what each rank holds between uses. The stage is a policy, not a code path.

| stage | parameters between uses | gradients while accumulating | optimizer |
|---|---|---|---|
| 0 | whole | whole, summed once a step | whole |
| 1 | gathered from the first forward of a step to its last backward | whole, summed once a step | sharded |
| 2 | as in 1 | sharded: summed after every microbatch | sharded |
| 3 | sharded, gathered for each use | sharded | sharded |

Stage 0 is a shard group of one rank: nothing is divided, gradients are summed over the replicas; FSDP computes with a copy of the parameters
even so. Stage 3 gathers the matrices of blocks in the dtype in which they are multiplied (cast_gather.py). Gradients are sums, not means: losses
are divided by the global number of targets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from phase8.accelerator import locks_pages, reaches_peers
from phase8.config.schema import ZeroSection
from phase8.distributed.mesh import Mesh
from phase8.distributed.placement import is_of_divided_experts
from phase8.topology import TOKENS
from phase8.zero.arrivals import Arrivals
from phase8.zero.cast_gather import Owned, gather_in
from phase8.zero.copy_engine_gather import CopyEngineGather
from phase8.zero.host_sums import add_on_device


def shard_size(zero: ZeroSection, *, num_token_ranks: int) -> int:
    """Number of ranks that divide one copy of the model, of those that read different tokens."""
    if zero.stage == 0:
        return 1
    return num_token_ranks if zero.shard_size is None else zero.shard_size


def gathered_dtype(zero: ZeroSection, compute_dtype: torch.dtype, parameter_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights of blocks that layers round are gathered: that of computation where this is less to send, else their own."""
    is_narrow = compute_dtype.itemsize < parameter_dtype.itemsize
    is_rounded = zero.engine == "fsdp" and zero.stage == 3 and zero.gather_dtype is None
    return compute_dtype if is_narrow and is_rounded else parameter_dtype


def shard_block(
    block: nn.Module,
    zero: ZeroSection,
    mesh: Mesh,
    dims: Mapping[nn.Parameter, int],
    *,
    rounded: Collection[nn.Parameter],
    dtype: torch.dtype,
    num_microbatches: int,
    arrivals: Arrivals | None = None,
    copies: CopyEngineGather | None = None,
) -> None:
    """Divides one block, whose parameters must be initialised; the parts of other ranks are freed.

    Args:
        block: Block; experts that ranks share are divided over the ranks that hold the same ones.
        zero: ZeRO section.
        mesh: Mesh of the ranks.
        dims: Dim of each parameter that is divided; along any other than the first, the ranks have to divide it evenly.
        rounded: Parameters that layers round to the dtype in which they compute.
        dtype: That dtype.
        num_microbatches: Microbatches of a step.
        arrivals: What fetches offloaded blocks of the chunk ahead, to which they are added in their order; None: FSDP does.
        copies: What gathers the blocks of the chunk, but for experts that ranks share; None: FSDP's own collective.
    """
    if _is_divided(zero, mesh):
        options = {
            "reshard_after_forward": zero.stage == 3,
            "offload_policy": _offload(zero, mesh),
            "shard_placement_fn": lambda parameter: Shard(dims[parameter]),
        }
        owned = [
            Owned(owner, name, dims[parameter])
            for owner in block.modules()
            for name, parameter in owner.named_parameters(recurse=False)
            if parameter in rounded and gathered_dtype(zero, dtype, parameter.dtype) != parameter.dtype and not parameter.is_meta
        ]
        experts = list(_of_divided_experts(block))
        is_summed_late = _is_summed_late(zero, num_microbatches)
        for module in experts:
            fully_shard(module, mesh=mesh.expert_data_mesh(is_summed_late=is_summed_late), **options)
        divided = fully_shard(block, mesh=mesh.data_mesh(is_summed_late=is_summed_late), **options)
        for module in experts:
            gather_in(dtype, [each for each in owned if each.owner is module], module)
        gather_in(dtype, [each for each in owned if each.owner not in experts], divided, None if experts else arrivals)
        if copies is not None:
            divided.set_custom_all_gather(copies)


def arrivals_of_chunk(zero: ZeroSection, mesh: Mesh) -> Arrivals | None:
    """What fetches the offloaded blocks of a chunk ahead; None: nothing is offloaded, or FSDP does it, as it does for several ranks."""
    return Arrivals() if zero.offload_params != "none" and mesh.shard.size == 1 else None


def copies_of_chunk(zero: ZeroSection, mesh: Mesh) -> CopyEngineGather | None:
    """What gathers the blocks of a chunk by copy engines; None: nothing is gathered, or not so. The first call is a collective of the shard group."""
    shard = mesh.shard
    return CopyEngineGather(shard.group) if zero.copy_engine_gather and shard.mesh is not None and reaches_peers(shard.mesh.device_type) else None


def shard_model(model: nn.Module, zero: ZeroSection, mesh: Mesh, *, num_microbatches: int) -> None:
    """Divides what is in no block, after all blocks; embedding and head stay gathered from forward to backward, being used at both ends."""
    if not _is_divided(zero, mesh):
        return
    ranks = mesh.data_mesh(is_summed_late=_is_summed_late(zero, num_microbatches))
    fully_shard(model, mesh=ranks, reshard_after_forward=False, offload_policy=_offload(zero, mesh))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if _has_several_ranks(mesh):
                module.set_gradient_divide_factor(1.0)  # for one rank FSDP would divide, into a copy of all gradients of a block
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other, and a factor of one needs no other


def sum_gradients_after(model: nn.Module, zero: ZeroSection, *, is_last: bool) -> None:
    """Sets what the backward of the next microbatch communicates: gradients that may wait for the last microbatch do.

    From stage 2 on, gradients are summed over the shard group after every microbatch, since they are kept sharded; over replicas once. Below stage 3
    parameters stay gathered. What is summed over all ranks goes to offloaded parameters on the host; until then it stays on the device, for which
    the ranks need a dim of replicas (`_is_summed_late`).
    """
    if isinstance(model, FSDPModule):
        if zero.offload_gradients:
            add_on_device(model)
        model.set_requires_gradient_sync(is_last or zero.stage >= 2)
        model.set_requires_all_reduce(is_last or zero.offload_gradients)
        model.set_reshard_after_backward(is_last or zero.stage == 3)


def free_gathered(model: nn.Module) -> None:
    """Frees what forwards without a backward have gathered; weights that are gathered are not gathered again, even if their parts have changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _of_divided_experts(block: nn.Module) -> Iterator[nn.Module]:
    """The modules whose own parameters are those of experts that ranks share."""
    for module in block.modules():
        own = next(module.parameters(recurse=False), None)
        if own is not None and is_of_divided_experts(own):
            yield module


def _is_divided(zero: ZeroSection, mesh: Mesh) -> bool:
    return mesh.device_mesh is not None and (_has_several_ranks(mesh) or zero.offload_params != "none")


def _is_summed_late(zero: ZeroSection, num_microbatches: int) -> bool:
    """Whether gradients of offloaded parameters stay on the device until the last microbatch."""
    return zero.offload_params != "none" and not zero.offload_gradients and num_microbatches > 1


def _has_several_ranks(mesh: Mesh) -> bool:
    return any(axis.size > 1 for axis in mesh.axes(TOKENS))


def _offload(zero: ZeroSection, mesh: Mesh) -> OffloadPolicy:
    if zero.offload_params == "none":
        return OffloadPolicy()
    assert mesh.device_mesh is not None
    return CPUOffloadPolicy(pin_memory=locks_pages(mesh.device_mesh.device_type))
