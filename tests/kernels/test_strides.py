"""Operators compute the same whatever the strides of what they are given: kernels that are not told strides must not see them."""

import importlib

import pytest
import torch

NUM_SEQUENCES, LENGTH, HEADS, SIZE = 2, 20, 2, 16


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def sequences(*shape):
    return drawn(NUM_SEQUENCES, LENGTH, *shape)


def starts():
    return torch.rand(NUM_SEQUENCES, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.2


def heads():
    return sequences(HEADS, SIZE)


def log_decays():
    return -sequences(HEADS).abs()


def state():
    return drawn(NUM_SEQUENCES, HEADS, SIZE, SIZE)


def of_mixer_inputs():
    before = drawn(NUM_SEQUENCES, 3, 3 * HEADS * SIZE)
    return sequences(3, HEADS, SIZE), drawn(3 * HEADS * SIZE, 4), drawn(LENGTH, SIZE // 2), drawn(HEADS).abs(), starts(), before, 1e-5, True, True


def of_low_rank_mixer_inputs():
    ups = [drawn(HEADS * SIZE, 4) for _ in range(3)]
    return sequences(12), ups, drawn(3 * HEADS * SIZE, 4), drawn(LENGTH, SIZE // 2), drawn(HEADS).abs(), starts(), HEADS, 1e-5, True, True


def of_window_attention():
    documents = starts().cumsum(1, dtype=torch.int32)
    kept = [drawn(NUM_SEQUENCES, 3, HEADS, SIZE) for _ in range(2)]
    of_kept = torch.zeros(NUM_SEQUENCES, 3, dtype=torch.int32)
    return heads(), heads(), heads(), *kept, documents, of_kept, drawn(HEADS).abs(), 8, 3, 4


def of_low_rank_swiglu():
    return drawn(LENGTH, 32), drawn(40, 16), drawn(40, 16), drawn(16, 40)


# For each module with kernels: its operators, and arguments of each; of a backward what goes in front of those of the forward.
CASES = {
    "mixer_inputs": {"_forward": of_mixer_inputs, "_backward": lambda: ([heads() for _ in range(5)], *of_mixer_inputs())},
    "low_rank_mixer_inputs": {
        "_forward": of_low_rank_mixer_inputs, "_backward": lambda: ([heads() for _ in range(5)], *of_low_rank_mixer_inputs())
    },
    "window_attention": {
        "_forward": of_window_attention, "_backward": lambda: (heads(), heads(), sequences(HEADS), *of_window_attention())
    },
    "green_scan": {
        "_forward": lambda: (sequences(HEADS), drawn(HEADS), 1 + drawn(HEADS).abs(), drawn(HEADS), starts(), drawn(NUM_SEQUENCES, HEADS, 2)),
        "_backward": lambda: (sequences(HEADS, 2), sequences(HEADS, 2), drawn(HEADS), starts(), drawn(NUM_SEQUENCES, HEADS, 2)),
    },
    "gated_linear_attention": {
        "_forward": lambda: (heads(), heads(), heads(), log_decays(), starts(), state()),
        "_backward": lambda: (heads(), state(), heads(), heads(), heads(), log_decays(), starts(), state()),
        "_added_state": lambda: (heads(), heads(), log_decays(), starts(), True),
    },
    "gated_delta_rule": {
        "_forward": lambda: (heads(), heads(), heads(), log_decays(), sequences(HEADS).sigmoid(), starts(), state()),
        "_backward": lambda: (heads(), state(), heads(), heads(), heads(), log_decays(), sequences(HEADS).sigmoid(), starts(), state()),
    },
    "low_rank_swiglu": {"_forward": of_low_rank_swiglu, "_backward": lambda: (drawn(LENGTH, 16), *of_low_rank_swiglu())},
    "fp8_numbers": {"_forward": lambda: (drawn(LENGTH, 24), drawn(LENGTH).abs(), drawn(24).abs(), torch.float8_e4m3fn)},
    "residual_norm": {"residual_norm": lambda: (drawn(LENGTH, 24), drawn(LENGTH, 24) + 1, drawn(24), 1e-5)},
    "decoding_product": {
        "normed_product": lambda: (drawn(3, 24), drawn(3, 24) + 1, drawn(24), 1e-5, drawn(32, 24)),
        "gated": lambda: (drawn(3, 32),),
    },
    "cross_entropy": {"_forward": lambda: (drawn(LENGTH, 16), drawn(48, 16), torch.arange(LENGTH) % 48, None, True, True)},
}  # fmt: skip


def part_of_wider_rows(x):
    """A view that leaves out what is between its rows, as a slice of a sequence does."""
    wide = x.new_ones(*x.shape[:-1], x.shape[-1] + 5)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def turned_with_gaps(x):
    """A view whose dims are in memory the other way round, and whose last dim has gaps."""
    wide = x.new_ones(*x.shape[:-1], 2 * x.shape[-1]).movedim(0, -1).contiguous().movedim(-1, 0)
    wide[..., ::2] = x
    return wide[..., ::2]


def laid_out(argument, layout, device):
    if isinstance(argument, (list, tuple)):
        return [laid_out(each, layout, device) for each in argument]
    return layout(argument.to(device)) if isinstance(argument, torch.Tensor) else argument


@pytest.mark.parametrize(("module", "operator"), [(module, operator) for module, operators in CASES.items() for operator in operators])
def test_results_do_not_depend_on_strides(module, operator, kernel_device, monkeypatch):
    place = importlib.import_module(f"phase8.kernels.{module}")
    monkeypatch.setattr(place, "uses_triton", lambda x: True)
    arguments = CASES[module][operator]()
    expected, *others = (
        getattr(place, operator)(*laid_out(arguments, layout, kernel_device))
        for layout in (torch.Tensor.contiguous, part_of_wider_rows, turned_with_gaps)
    )
    for found in others:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
