from phase8.exchanges import NO_EXCHANGES, Exchange, Exchanges, Operation, gathered, scattered

GATHER, SCATTER = Operation.ALL_GATHER, Operation.REDUCE_SCATTER


def test_backward_has_the_dual_of_forward():
    assert gathered(3) == Exchanges((Exchange(GATHER, 3),), (Exchange(SCATTER, 3),), (Exchange(GATHER, 3),))
    wide = scattered(4, is_wide=True)
    assert (wide.forward, wide.backward) == ((Exchange(SCATTER, 4, is_wide=True),), (Exchange(GATHER, 4, is_wide=True),))


def test_a_sequence_runs_backward_in_reverse_and_repeats_all_but_what_its_end_leaves_out():
    end = Exchanges(forward=(Exchange(SCATTER, 2),), backward=(Exchange(GATHER, 2),))
    found = gathered(1).then(gathered(5)).then(end)
    assert found.forward == (Exchange(GATHER, 1), Exchange(GATHER, 5), Exchange(SCATTER, 2))
    assert found.backward == (Exchange(GATHER, 2), Exchange(SCATTER, 5), Exchange(SCATTER, 1))
    assert found.repeated == (Exchange(GATHER, 1), Exchange(GATHER, 5))
    # What follows keeps its input, so the end is repeated where it is none.
    assert end.then(gathered(1)).repeated == (Exchange(SCATTER, 2), Exchange(GATHER, 1))
    assert NO_EXCHANGES.then(found) == found and found.then(NO_EXCHANGES).repeated == found.forward
