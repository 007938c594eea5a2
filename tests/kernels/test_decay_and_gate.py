import math

import torch

from phase8.kernels.decay_and_gate import POTENTIAL_MAX, DecayAndGate, bounded_potential


def test_potentials_stay_within_their_bound_and_small_ones_as_they_are():
    u = torch.tensor([-100.0, -1e-3, 0.0, 1e-3, 100.0], dtype=torch.float64)
    torch.testing.assert_close(bounded_potential(u), torch.tensor([-POTENTIAL_MAX, -1e-3, 0.0, 1e-3, POTENTIAL_MAX], dtype=torch.float64))


def test_columns_are_step_gate_potential_and_rate():
    scalars = torch.tensor([[[0.5, -1.0, 0.3, 2.0]]], dtype=torch.float64)
    gates = DecayAndGate(torch.tensor([0.1]), torch.tensor([-0.2]), None, 8)
    log_decay, gate, rate = gates.of(scalars, None, lambda u: (2 * u, 3 * u))
    assert math.isclose(log_decay.item(), -math.log1p(math.exp(0.6)) * math.exp(0.6), rel_tol=1e-6)
    assert math.isclose(gate.item(), 1 / (1 + math.exp(1.2 - 0.9)), rel_tol=1e-6)
    assert math.isclose(rate.item(), 1 / (1 + math.exp(-2.0)) / 8, rel_tol=1e-6)


def test_a_floor_bounds_the_decay_and_channels_have_gates_of_their_own():
    gates = DecayAndGate(torch.zeros(1), torch.zeros(1), -5.0, None)
    log_decay, gate, rate = gates.of(torch.full((1, 1, 1), 50.0), torch.tensor([[[0.0, 50.0]]]), None)
    assert log_decay.item() == -5.0 and rate is None
    torch.testing.assert_close(gate, torch.tensor([[[0.5, 1.0]]]))
