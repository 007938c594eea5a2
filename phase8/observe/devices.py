"""Dense peak FLOP/s of known GPUs: the denominator of MFU.

Sources are NVIDIA's data sheets and architecture white papers, named at each row. Rates marked "with sparsity" there are halved here.
Half-precision rates are those with fp32 accumulation, the only ones that matter in training; on GeForce cards these are half the figure
that is usually advertised.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class DevicePeak(NamedTuple):
    """Peak rates of one GPU, in TFLOP/s.

    Args:
        name: Regular expression of the whole device name, vendor and family prefix removed. A part of the name would not do: "Laptop
            GPU", "Ti" and MIG slices are other devices.
        half: fp16 and bf16 matmuls with fp32 accumulation.
        tf32: fp32 matmuls in tf32; on GPUs without tf32 units these run as fp32.
        fp32: fp32 matmuls.
        has_bf16: False before Ampere.
    """

    name: str
    half: float
    tf32: float
    fp32: float
    has_bf16: bool = True


_PEAKS = (
    # Blackwell: NVIDIA Blackwell Architecture Technical Brief, table 3; HGX B300 data sheet.
    DevicePeak(r"GB200", half=2500, tf32=1250, fp32=80),
    DevicePeak(r"B200", half=2250, tf32=1100, fp32=75),
    DevicePeak(r"B300( SXM6 AC)?", half=2250, tf32=1100, fp32=75),
    # Hopper: H100, H200 and GH200 data sheets. The SXM part reports its memory and no form factor.
    DevicePeak(r"H100 80GB HBM3|H100 SXM5?|H200|GH200 \d+GB", half=989.5, tf32=494.7, fp32=67),
    DevicePeak(r"H100 NVL|H200 NVL", half=835.5, tf32=417.5, fp32=60),
    DevicePeak(r"H100 PCIe", half=756.5, tf32=378, fp32=51),
    # Ada: L4, L40 and L40S data sheets; RTX 6000 Ada data sheet.
    DevicePeak(r"L4", half=121, tf32=60, fp32=30.3),
    DevicePeak(r"L40", half=181.05, tf32=90.5, fp32=90.5),
    DevicePeak(r"L40S", half=362.05, tf32=183, fp32=91.6),
    DevicePeak(r"RTX 6000 Ada Generation", half=364.2, tf32=182.1, fp32=91.1),
    # Ampere: A100, A30, A40, A10 and RTX A6000 data sheets.
    DevicePeak(r"A100-(SXM4?|PCIE)-(40|80)GB|A100 80GB PCIe", half=312, tf32=156, fp32=19.5),
    DevicePeak(r"A30", half=165, tf32=82, fp32=10.3),
    DevicePeak(r"A40", half=149.7, tf32=74.8, fp32=37.4),
    DevicePeak(r"A10", half=125, tf32=62.5, fp32=31.2),
    DevicePeak(r"RTX A6000", half=154.8, tf32=77.4, fp32=38.7),
    # GeForce: appendices of the GA102, Ada and RTX Blackwell white papers.
    DevicePeak(r"RTX 5090", half=209.5, tf32=104.8, fp32=104.8),
    DevicePeak(r"RTX 5080", half=112.6, tf32=56.3, fp32=56.3),
    DevicePeak(r"RTX 5070 Ti", half=87.9, tf32=43.9, fp32=43.9),
    DevicePeak(r"RTX 4090", half=165.2, tf32=82.6, fp32=82.6),
    DevicePeak(r"RTX 4080", half=97.5, tf32=48.7, fp32=48.7),
    DevicePeak(r"RTX 4070 Ti", half=80.2, tf32=40.1, fp32=40.1),
    DevicePeak(r"RTX 3090 Ti", half=80, tf32=40, fp32=40),
    DevicePeak(r"RTX 3090", half=71, tf32=35.6, fp32=35.6),
    DevicePeak(r"RTX 3080 Ti", half=68.2, tf32=34.1, fp32=34.1),
    DevicePeak(r"RTX 3080", half=59.5, tf32=29.8, fp32=29.8),
    DevicePeak(r"RTX 3070", half=40.6, tf32=20.3, fp32=20.3),
    # Turing and Volta: T4 and V100 data sheets.
    DevicePeak(r"T4", half=65, tf32=8.1, fp32=8.1, has_bf16=False),
    DevicePeak(r"V100S-PCIE-32GB", half=130, tf32=16.4, fp32=16.4, has_bf16=False),
    DevicePeak(r"V100-SXM[23]-\d+GB(-LS)?", half=125, tf32=15.7, fp32=15.7, has_bf16=False),
    DevicePeak(r"V100-PCIE-\d+GB", half=112, tf32=14, fp32=14, has_bf16=False),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak FLOP/s of a GPU for matmuls in one number format.

    Args:
        device_name: As `torch.cuda.get_device_name` reports it.
        dtype: `bf16`, `fp16`, `tf32` or `fp32`.

    Returns:
        FLOP/s, or None for a device or a format that is not in the table; MFU is then unknown.
    """
    name = re.sub(r"^(NVIDIA |Tesla |GeForce )*", "", device_name)
    for peak in _PEAKS:
        if re.fullmatch(peak.name, name):
            teraflops = {"bf16": peak.half if peak.has_bf16 else None, "fp16": peak.half, "tf32": peak.tf32, "fp32": peak.fp32}.get(dtype)
            return None if teraflops is None else teraflops * 1e12
    return None
