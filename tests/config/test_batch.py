import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase8.config.batch import batch_shape
from phase8.config.schema import ParallelSection, TrainSection
from phase8.errors import ConfigError

untimed = settings(deadline=None)
SIZES = st.integers(1, 12)


def shape_of(total, micro, count, *, ranks=1):
    train = TrainSection(global_batch_size=total, micro_batch_size=micro)
    return batch_shape(train, ParallelSection(num_microbatches=count), data_parallel_size=ranks)


@untimed
@given(micro=SIZES, count=SIZES, ranks=SIZES, missing=st.sampled_from(["total", "micro", "count", "nothing"]))
def test_any_two_sizes_give_the_third(micro, count, ranks, missing):
    given_sizes = {"total": micro * count * ranks, "micro": micro, "count": count}
    given_sizes.pop(missing, None)
    shape = shape_of(given_sizes.get("total"), given_sizes.get("micro"), given_sizes.get("count"), ranks=ranks)
    assert (shape.global_batch_size, shape.micro_batch_size, shape.num_microbatches) == (micro * count * ranks, micro, count)
    assert shape.data_parallel_size == ranks


@untimed
@given(total=st.integers(1, 60), micro=st.none() | SIZES, count=st.none() | SIZES, ranks=SIZES)
def test_sizes_fit_or_are_refused(total, micro, count, ranks):
    fits = total % ((micro or 1) * (count or 1) * ranks) == 0 and (micro is None or count is None or micro * count * ranks == total)
    if fits:
        shape = shape_of(total, micro, count, ranks=ranks)
        assert shape.micro_batch_size * shape.num_microbatches * ranks == total
        assert micro in (None, shape.micro_batch_size) and count in (None, shape.num_microbatches)
    else:
        with pytest.raises(ConfigError):
            shape_of(total, micro, count, ranks=ranks)


def test_the_global_batch_alone_is_one_forward():
    shape = shape_of(12, None, None, ranks=3)
    assert (shape.micro_batch_size, shape.num_microbatches) == (4, 1)


SENTENCES = [
    (
        (32, 4, 4, 1),
        "train.global_batch_size 32 is not train.micro_batch_size 4 x parallel.num_microbatches 4 x data-parallel size 1; "
        "give any two of the three and leave the other null.",
    ),
    (
        (4, None, 8, 1),
        "train.global_batch_size 4 is not train.micro_batch_size null x parallel.num_microbatches 8 x data-parallel size 1; "
        "give any two of the three and leave the other null.",
    ),
    (
        (8, 3, None, 2),
        "train.global_batch_size 8 is not train.micro_batch_size 3 x parallel.num_microbatches null x data-parallel size 2; "
        "give any two of the three and leave the other null.",
    ),
    ((33, None, None, 8), "train.global_batch_size 33 is not a multiple of the data-parallel size 8; use 40, for example."),
    (
        (None, 4, None, 1),
        "train.global_batch_size is null, which needs both train.micro_batch_size 4 and parallel.num_microbatches null; give any two of the three.",
    ),
]


@pytest.mark.parametrize(("sizes", "sentence"), SENTENCES)
def test_sizes_that_disagree_are_one_sentence(sizes, sentence):
    *batch, ranks = sizes
    with pytest.raises(ConfigError) as caught:
        shape_of(*batch, ranks=ranks)
    assert caught.value.problems == [sentence]
