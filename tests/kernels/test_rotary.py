import math

import pytest
import torch

from phase8.config.rope_scaling import RopeScaling
from phase8.kernels.rotary import rotary_angles, rotary_frequencies, rotate

CPU = torch.device("cpu")


def test_angles_are_position_times_frequency_also_far_away():
    angles = rotary_angles(3, 8, base=100.0, first_position=10_000_000, device=CPU)
    for position in range(3):
        for pair in range(4):
            expected = math.fmod((10_000_000 + position) * 100.0 ** (-pair / 4), 2 * math.pi)
            assert angles[position, pair].item() == pytest.approx(expected, abs=1e-5)


def test_a_rotation_is_a_product_of_complex_numbers():
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = rotary_angles(5, 8, base=1e4, first_position=0, device=CPU).double()
    expected = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(rotate(x, angles), torch.cat((expected.real, expected.imag), dim=-1))


def test_products_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def product(query, key):
        turned = [rotate(x, rotary_angles(1, 16, base=1e4, first_position=at, device=CPU)) for x, at in ((q, query), (k, key))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(7, 3), product(1007, 1003), rtol=1e-5, atol=1e-5)
    assert not torch.isclose(product(7, 3), product(7, 4))


def test_scaled_frequencies_of_llama_3():
    """Meta's function for Llama 3.1, in wavelengths, with the frequencies of its models."""
    plain = rotary_frequencies(128, base=500_000.0, device=CPU)
    expected = []
    for frequency in plain.tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192 / 1:
            expected.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    found = rotary_frequencies(128, base=500_000.0, rope_scaling=RopeScaling(type="llama3"), device=CPU)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    ratios = plain / found
    assert (ratios == 1).sum() > 20 and ((ratios - 8).abs() < 1e-9).sum() > 20 and ((ratios > 1.01) & (ratios < 7.9)).sum() > 5


def test_linear_scaling_puts_positions_closer_together():
    near = rotary_angles(9, 8, base=100.0, rope_scaling=RopeScaling(type="linear", factor=4.0), first_position=0, device=CPU)
    torch.testing.assert_close(near[::4], rotary_angles(3, 8, base=100.0, first_position=0, device=CPU))
