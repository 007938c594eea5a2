"""A blend that changes repeats no window of an epoch and leaves none out, whatever comes, goes and comes back."""

import json
from collections import defaultdict

from phase8.data.blend import BlendTable
from phase8.data.order_history import OrderHistory, changed, history_of
from phase8.data.permutation import permute
from phase8.data.sampler import SampleOrder

SEED = 5
WINDOWS = {"books": 40, "code": 25, "web": 31}


def fingerprint(**weights):
    """As of sources in this order; a name stands for content."""
    sources = [
        {"name": f"{name} here", "weight": weight, "idx_sha256": name, "bin_bytes": 1, "num_tokens": WINDOWS[name]}
        for name, weight in weights.items()
    ]
    return {"order_version": 1, "sequence_length": 8, "sources": sources}


# Blends, each for a number of samples.
BLENDS = [
    (fingerprint(books=2, code=1), 31),
    (fingerprint(books=1, code=1), 17),
    (fingerprint(web=3, code=1), 50),
    (fingerprint(code=1, books=2, web=1), 90),
]


def order_of(blend, history):
    sources = blend["sources"]
    return SampleOrder(
        seed=SEED, num_windows=[source["num_tokens"] for source in sources], blend=BlendTable([source["weight"] for source in sources]),
        begin=history.begin, draws=history.draws,
    )  # fmt: skip


def test_each_source_delivers_what_it_would_deliver_alone():
    history, number, windows, keys = OrderHistory(), 0, defaultdict(list), {}
    for place, (blend, num_samples) in enumerate(BLENDS):
        if place:
            history = changed(history, BLENDS[place - 1][0], blend, num_samples=number)
        history = history_of(json.loads(json.dumps(history.record)))  # as a checkpoint keeps it
        order, names = order_of(blend, history), [source["idx_sha256"] for source in blend["sources"]]
        for source, draws in zip(names, order.draws, strict=True):
            assert keys.setdefault(source, draws.key) == draws.key
        for _ in range(num_samples):
            source, window = order.locate(number)
            windows[names[source]].append(window)
            number += 1
        counts = {name: len(windows[name]) / WINDOWS[name] for name in names}
        assert dict(zip(names, order.epochs(number), strict=True)) == counts
    assert len(set(keys.values())) == 3 and all(len(found) > WINDOWS[name] for name, found in windows.items())  # more than an epoch of each
    for name, found in windows.items():
        size = WINDOWS[name]
        assert found == [permute(n % size, size=size, key=(SEED, keys[name], n // size)) for n in range(len(found))]


def test_a_run_whose_blend_stays_has_no_history():
    assert OrderHistory().record is None and history_of(None) == OrderHistory()
    plain = order_of(BLENDS[0][0], OrderHistory())
    assert [plain.locate(n) for n in range(9)] == [
        (source, permute(own, size=plain.num_windows[source], key=(SEED, source, 0))) for source, own in map(plain.blend.locate, range(9))
    ]


def test_a_run_that_has_read_nothing_begins_with_its_blend():
    """Its data sets had other numbers until the first checkpoint than after it, which does not record them: windows came twice or never."""
    before, now = BLENDS[0][0], fingerprint(web=1, books=1)
    history = changed(OrderHistory(), before, now, num_samples=0)
    assert history_of(history.record) == history
    assert [order_of(now, history).locate(n) for n in range(20)] == [order_of(now, OrderHistory()).locate(n) for n in range(20)]


def test_what_never_delivered_a_sample_is_forgotten():
    before, now = BLENDS[2][0], fingerprint(books=1)
    history = changed(OrderHistory(), before, now, num_samples=1)
    assert [each.source["idx_sha256"] for each in history.left] == ["web"] and history.draws[0].drawn == 0
    assert [each.source["idx_sha256"] for each in changed(OrderHistory(), before, now, num_samples=9).left] == ["web", "code"]
