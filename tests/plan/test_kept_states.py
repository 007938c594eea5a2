"""Bytes of what recomputed blocks keep of the exchanges between slices."""

import os

import pytest

from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.plan.kept_states import kept_of_exchanges
from phase8.topology import Topology

# Width 32 in 4 heads of 8, and 4 ranks with slices of 16 tokens.
SETTINGS = ("model.d_model=32", "model.num_layers=1", "model.num_heads=4", "model.sequence_length=16", "model.local_window_size=8")
WIDTH, HEADS, SIZE = 32, 4, 8
INPUTS = 3 * 3 * WIDTH * 2  # three inputs of the convolution of q, k and v, bf16
MAPS = 4 * HEADS * SIZE * (SIZE + 1) * 4  # what each rank's slice adds and keeps, fp32


def kept(*settings, recompute="full", **degrees):
    model = without_auto(load_config(os.devnull, [*SETTINGS, *settings])).model
    return kept_of_exchanges(model, Topology(context_parallel_size=4, **degrees), recompute=recompute, batch_size=1, element_bytes=2)


@pytest.mark.parametrize(("window", "tokens"), [(8, 7), (33, 32), (500, 48)])  # within a slice; over two; more than there are before the last
def test_inputs_keys_and_maps_that_a_slice_has_fetched_are_kept(window, tokens):
    keys = 2 * WIDTH * tokens * 2
    assert kept(f"model.local_window_size={window}") == INPUTS + keys + MAPS
    assert kept(f"model.local_window_size={window}", recompute="selective") == INPUTS + keys + MAPS


def test_tensor_parallel_ranks_divide_what_is_kept_and_exchange_again_where_whole_blocks_are_recomputed():
    assert kept(recompute="selective", tensor_parallel_size=2) == kept() // 2
    assert kept(tensor_parallel_size=2) == 0


def test_nothing_is_kept_besides_where_nothing_is_recomputed_or_all_is_exchanged_again():
    assert kept(recompute="none") == kept("model.block=transformer") == 0
