"""Cost of the optimizer on a rank: AdamW by its memory traffic, Muon by its products too. No torch."""

from __future__ import annotations

from typing import NamedTuple

from phase8.plan.layer_cost import KERNEL_SECONDS, PRODUCT_SHARE, Cost, Rates
from phase8.plan.memory import FP32_BYTES
from phase8.topology import AxisName

# Norm of the gradients and AdamW: a gradient is read twice, the weight is read and written, and so are the moments, by their bytes; 19 ms for 1.35B
# on an H100 with moments in fp32.
UPDATED_BYTES = 4 * FP32_BYTES
UPDATE_SHARE = 0.8
UPDATE_SECONDS = Cost(0.3e-3, 2e-3)
# Muon is operations one by one (optim/muon.py), whose reads and writes are counted and not measured: numbers in fp32 for each one of a part, in the
# dtype of the iteration for each one of a whole matrix and of a square one, and kernels of a matrix.
PART_PASSES = 37
WHOLE_PASSES = 48
SQUARE_PASSES = 60
MUON_KERNELS = 70
# The host launches an operation within about this.
LAUNCH_SECONDS = 8e-6
# On the host AdamW reads four numbers and writes three; where it runs on the device, the norm reads one there.
HOST_UPDATED_BYTES, HOST_NORM_BYTES = 7 * FP32_BYTES, FP32_BYTES


class MuonWork(NamedTuple):
    """Work of a rank for matrices that are orthogonalised.

    Args:
        num_parts: Numbers of its parts of them.
        flops: FLOPs of the products for its own matrices.
        num_tensors: Number of parameters that are its own.
        num_whole: Numbers of these.
        num_squares: Numbers of the square matrices that an iteration makes of them.
        sent: Numbers that leave the rank, by the widest axis that they cross.
    """

    num_parts: float = 0.0
    flops: float = 0.0
    num_tensors: float = 0.0
    num_whole: float = 0.0
    num_squares: float = 0.0
    sent: tuple[tuple[AxisName, float], ...] = ()


class UpdateWork(NamedTuple):
    """Work of the optimizer on a rank.

    Args:
        num_updated: Parameters that it updates.
        moments_bytes: Bytes of what AdamW keeps of them.
        muon: Work for those of them that are matrices of Muon.
    """

    num_updated: float
    moments_bytes: float
    muon: MuonWork = MuonWork()


def device_cost(work: UpdateWork, rates: Rates, *, element_bytes: int, is_offloaded: bool) -> Cost:
    """Cost of a step of the optimizer on the device, without communication.

    Args:
        work: The work.
        rates: Rates of the GPU.
        element_bytes: Bytes of a number in the iterations of Muon.
        is_offloaded: Whether parameters are updated on the host, and only matrices orthogonalised here.
    """
    muon = work.muon
    moved = (muon.num_whole * WHOLE_PASSES + muon.num_squares * SQUARE_PASSES) * element_bytes / rates.memory
    own = Cost(muon.flops / (rates.peak * PRODUCT_SHARE) + moved + muon.num_tensors * MUON_KERNELS * KERNEL_SECONDS)
    launched = Cost(0.0, muon.num_tensors * MUON_KERNELS * LAUNCH_SECONDS)
    if is_offloaded:
        return UPDATE_SECONDS.plus(own, launched)
    updated = (work.num_updated - muon.num_parts) * UPDATED_BYTES + 2 * work.moments_bytes
    parts = muon.num_parts * PART_PASSES * FP32_BYTES / rates.memory
    return Cost(updated / (rates.memory * UPDATE_SHARE)).plus(Cost(parts), UPDATE_SECONDS, own, launched)


def host_bytes(work: UpdateWork) -> float:
    """Bytes that the host moves through its memory where parameters are offloaded, to update them or to take the norm of their gradients alone."""
    of_adamw = work.num_updated - work.muon.num_parts
    moved = HOST_NORM_BYTES if _is_sent(work) else HOST_UPDATED_BYTES
    return of_adamw * moved + work.muon.num_parts * PART_PASSES * FP32_BYTES


def sent_bytes(work: UpdateWork) -> float:
    """Bytes that the device fetches where it updates offloaded parameters, those with short moments; less goes back, at the same time."""
    return (work.num_updated - work.muon.num_parts) * 2 * FP32_BYTES + work.moments_bytes if _is_sent(work) else 0.0


def _is_sent(work: UpdateWork) -> bool:
    """Whether moments are shorter than those of torch's AdamW, but for vectors and scalars."""
    return work.moments_bytes < 2 * FP32_BYTES * (work.num_updated - work.muon.num_parts)
