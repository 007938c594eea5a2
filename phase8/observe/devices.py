"""Peak rates of known GPUs: FLOP/s, the denominator of MFU, and the speeds of memory and links, on which predictions are based.

Sources are NVIDIA's data sheets and architecture white papers, named at each row. Rates marked "with sparsity" there are halved here.
Half-precision rates are those with fp32 accumulation, the only ones that matter in training; on GeForce cards these are half the figure
that is usually advertised. The rate of a link is that of one direction of NVLink, or of PCIe where there is no NVLink.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """Peak rates of one GPU: products in TFLOP/s, memory and link in GB/s.

    Args:
        name: Regular expression for the whole device name without vendor and family. Parts of a name would not do: "Laptop
            GPU", "Ti" and MIG slices are other devices.
        half: fp16 and bf16 matmuls with fp32 accumulation.
        tf32: fp32 matmuls in tf32; on GPUs without tf32 units these run as fp32.
        fp32: fp32 matmuls.
        memory: Bandwidth of its memory.
        link: Rate of the link to another GPU of its host.
        memory_gib: Size of its memory.
        has_bf16: False before Ampere.
        sustained: Sustained rate of products in training over that of an H100 of equal peak: below 1 where the power limit is reached sooner.
    """

    name: str
    half: float
    tf32: float
    fp32: float
    memory: float
    link: float
    memory_gib: float
    has_bf16: bool = True
    sustained: float = 1.0

    def peak_flops(self, dtype: str) -> float | None:
        """Dense peak FLOP/s of matmuls in `bf16`, `fp16`, `tf32` or `fp32`; None: the GPU has no such format, or the table lacks it."""
        teraflops = {"bf16": self.half if self.has_bf16 else None, "fp16": self.half, "tf32": self.tf32, "fp32": self.fp32}.get(dtype)
        return None if teraflops is None else teraflops * 1e12


_GPUS = (
    # Blackwell: NVIDIA Blackwell Architecture Technical Brief, table 3; HGX B300 data sheet.
    Gpu(r"GB200", half=2500, tf32=1250, fp32=80, memory=8000, link=900, memory_gib=186),
    Gpu(r"B200", half=2250, tf32=1100, fp32=75, memory=8000, link=900, memory_gib=180),
    Gpu(r"B300( SXM6 AC)?", half=2250, tf32=1100, fp32=75, memory=8000, link=900, memory_gib=268),
    # Hopper: H100, H200 and GH200 data sheets. The SXM part reports its memory and no form factor.
    Gpu(r"H100 80GB HBM3|H100 SXM5?|H100", half=989.5, tf32=494.7, fp32=67, memory=3350, link=450, memory_gib=80),
    Gpu(r"H200", half=989.5, tf32=494.7, fp32=67, memory=4800, link=450, memory_gib=141, sustained=0.945),
    Gpu(r"GH200 480GB|GH200", half=989.5, tf32=494.7, fp32=67, memory=4000, link=450, memory_gib=96),
    Gpu(r"GH200 \d+GB", half=989.5, tf32=494.7, fp32=67, memory=4900, link=450, memory_gib=144),
    Gpu(r"H100 NVL", half=835.5, tf32=417.5, fp32=60, memory=3900, link=300, memory_gib=94),
    Gpu(r"H200 NVL", half=835.5, tf32=417.5, fp32=60, memory=4800, link=450, memory_gib=141),
    Gpu(r"H100 PCIe", half=756.5, tf32=378, fp32=51, memory=2000, link=64, memory_gib=80),
    # Ada: L4, L40 and L40S data sheets; RTX 6000 Ada data sheet.
    Gpu(r"L4", half=121, tf32=60, fp32=30.3, memory=300, link=32, memory_gib=24),
    Gpu(r"L40", half=181.05, tf32=90.5, fp32=90.5, memory=864, link=32, memory_gib=48),
    Gpu(r"L40S", half=362.05, tf32=183, fp32=91.6, memory=864, link=32, memory_gib=48),
    Gpu(r"RTX 6000 Ada Generation", half=364.2, tf32=182.1, fp32=91.1, memory=960, link=32, memory_gib=48),
    # Ampere: A100, A30, A40, A10 and RTX A6000 data sheets.
    Gpu(r"A100-SXM4?-80GB|A100", half=312, tf32=156, fp32=19.5, memory=2039, link=300, memory_gib=80),
    Gpu(r"A100-SXM4?-40GB", half=312, tf32=156, fp32=19.5, memory=1555, link=300, memory_gib=40),
    Gpu(r"A100-PCIE-80GB|A100 80GB PCIe", half=312, tf32=156, fp32=19.5, memory=1935, link=32, memory_gib=80),
    Gpu(r"A100-PCIE-40GB", half=312, tf32=156, fp32=19.5, memory=1555, link=32, memory_gib=40),
    Gpu(r"A30", half=165, tf32=82, fp32=10.3, memory=933, link=32, memory_gib=24),
    Gpu(r"A40", half=149.7, tf32=74.8, fp32=37.4, memory=696, link=32, memory_gib=48),
    Gpu(r"A10", half=125, tf32=62.5, fp32=31.2, memory=600, link=32, memory_gib=24),
    Gpu(r"RTX A6000", half=154.8, tf32=77.4, fp32=38.7, memory=768, link=32, memory_gib=48),
    # GeForce: appendices of the GA102, Ada and RTX Blackwell white papers.
    Gpu(r"RTX 5090", half=209.5, tf32=104.8, fp32=104.8, memory=1792, link=64, memory_gib=32),
    Gpu(r"RTX 5080", half=112.6, tf32=56.3, fp32=56.3, memory=960, link=64, memory_gib=16),
    Gpu(r"RTX 5070 Ti", half=87.9, tf32=43.9, fp32=43.9, memory=896, link=64, memory_gib=16),
    Gpu(r"RTX 4090", half=165.2, tf32=82.6, fp32=82.6, memory=1008, link=32, memory_gib=24),
    Gpu(r"RTX 4080", half=97.5, tf32=48.7, fp32=48.7, memory=717, link=32, memory_gib=16),
    Gpu(r"RTX 4070 Ti", half=80.2, tf32=40.1, fp32=40.1, memory=504, link=32, memory_gib=12),
    Gpu(r"RTX 3090 Ti", half=80, tf32=40, fp32=40, memory=1008, link=32, memory_gib=24),
    Gpu(r"RTX 3090", half=71, tf32=35.6, fp32=35.6, memory=936, link=32, memory_gib=24),
    Gpu(r"RTX 3080 Ti", half=68.2, tf32=34.1, fp32=34.1, memory=912, link=32, memory_gib=12),
    Gpu(r"RTX 3080", half=59.5, tf32=29.8, fp32=29.8, memory=760, link=32, memory_gib=10),
    Gpu(r"RTX 3070", half=40.6, tf32=20.3, fp32=20.3, memory=448, link=32, memory_gib=8),
    # Turing and Volta: T4 and V100 data sheets.
    Gpu(r"T4", half=65, tf32=8.1, fp32=8.1, memory=320, link=16, memory_gib=16, has_bf16=False),
    Gpu(r"V100S-PCIE-32GB", half=130, tf32=16.4, fp32=16.4, memory=1134, link=16, memory_gib=32, has_bf16=False),
    Gpu(r"V100-SXM[23]-32GB(-LS)?|V100", half=125, tf32=15.7, fp32=15.7, memory=900, link=150, memory_gib=32, has_bf16=False),
    Gpu(r"V100-SXM[23]-\d+GB(-LS)?", half=125, tf32=15.7, fp32=15.7, memory=900, link=150, memory_gib=16, has_bf16=False),
    Gpu(r"V100-PCIE-32GB", half=112, tf32=14, fp32=14, memory=900, link=16, memory_gib=32, has_bf16=False),
    Gpu(r"V100-PCIE-\d+GB", half=112, tf32=14, fp32=14, memory=900, link=16, memory_gib=16, has_bf16=False),
)


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU of that name; None: it is not in the table.

    Args:
        device_name: As torch reports it, or the bare name in any case: `h100`, `rtx 4090`, `rtx4090`, `4090`.
    """
    name = re.sub(r"^(NVIDIA |Tesla |GeForce )*", "", device_name, flags=re.IGNORECASE)
    if short := re.fullmatch(r"(?:RTX)?[ _-]?(\d0\d0)(?:[ _-]?(Ti))?", name, flags=re.IGNORECASE):
        name = " ".join(("RTX", *filter(None, short.groups())))
    return next((gpu for gpu in _GPUS if re.fullmatch(gpu.name, name, flags=re.IGNORECASE)), None)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak FLOP/s of a GPU for matmuls in one number format.

    Args:
        device_name: As torch reports it.
        dtype: `bf16`, `fp16`, `tf32` or `fp32`.

    Returns:
        FLOP/s, or None for a device or a format that is not in the table; MFU is then unknown.
    """
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.peak_flops(dtype)
