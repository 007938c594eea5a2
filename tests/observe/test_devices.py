from __future__ import annotations

import pytest

from phase8.observe.devices import find_gpu, peak_flops


@pytest.mark.parametrize(
    ("device_name", "bf16_teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 3080", 59.5),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4080", 97.5),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
    ],
)
def test_known_gpus_have_their_dense_bf16_peak(device_name, bf16_teraflops):
    assert peak_flops(device_name, "bf16") == pytest.approx(bf16_teraflops * 1e12)


def test_each_format_has_its_own_peak():
    rates = [peak_flops("NVIDIA A100-SXM4-40GB", dtype) for dtype in ("bf16", "fp16", "tf32", "fp32")]
    assert rates == pytest.approx([312e12, 312e12, 156e12, 19.5e12])


@pytest.mark.parametrize("device_name", ["Tesla T4", "Tesla V100-SXM2-16GB", "Tesla V100-PCIE-32GB"])
def test_gpus_without_bf16_units_have_no_bf16_peak_and_run_tf32_as_fp32(device_name):
    assert peak_flops(device_name, "bf16") is None
    assert peak_flops(device_name, "fp16") is not None
    assert peak_flops(device_name, "tf32") == peak_flops(device_name, "fp32")


@pytest.mark.parametrize(
    "device_name",
    ["cpu", "", "NVIDIA GeForce RTX 3080 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA RTX A1000", "NVIDIA H20", "AMD Instinct MI300X"],
)
def test_a_device_that_only_resembles_a_known_one_is_unknown(device_name):
    assert peak_flops(device_name, "bf16") is None


def test_a_format_without_a_figure_is_unknown():
    assert peak_flops("NVIDIA H200", "fp8") is None


def test_the_bare_name_in_any_case_finds_a_gpu_too():
    assert find_gpu("h100") == find_gpu("NVIDIA H100 80GB HBM3") and find_gpu("rtx 4090") == find_gpu("NVIDIA GeForce RTX 4090")
    assert {find_gpu(name) for name in ("rtx4090", "RTX-4090", "4090")} == {find_gpu("NVIDIA GeForce RTX 4090")}
    assert find_gpu("3080ti") == find_gpu("RTX 3080 Ti") != find_gpu("3080") is not None and find_gpu("4090d") is None
    assert find_gpu("a100") == find_gpu("NVIDIA A100-SXM4-80GB") != find_gpu("NVIDIA A100-SXM4-40GB")


def test_memory_and_links_of_the_gpus_that_were_measured():
    h100, h200 = find_gpu("h100"), find_gpu("h200")
    assert (h100.memory, h200.memory, h100.memory_gib, h200.memory_gib) == (3350, 4800, 80, 141) and h100.link == h200.link == 450
