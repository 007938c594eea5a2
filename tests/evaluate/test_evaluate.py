"""The losses of sources: against a loop over single predictions, over windows, documents, ranks and batches."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from phase8.config.model_section import ModelSection
from phase8.config.schema import DataSection
from phase8.data.indexed import IndexedWriter
from phase8.data.made_with import made_with
from phase8.data.tokenizer import load_tokenizer
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.distributed.collectives import Axis
from phase8.errors import ConfigError, DataError, OutOfMemoryError
from phase8.evaluate import score
from phase8.evaluate.results import position_bounds, source_result, table
from phase8.evaluate.score import Forward, evaluate
from phase8.evaluate.selection import select_pieces
from phase8.evaluate.sources import open_pairs, read_text_sources
from phase8.model.model import build_model
from phase8.model.parameters import initialise
from tests.parallel.conftest import pool  # noqa: F401  the fixture

VOCABULARY, LENGTH, CPU = 300, 70, torch.device("cpu")
SENTENCE = "Größe, 日本語 and naïve 🙂 text; plain words too.\n"


def tiny_model(**overrides):
    section = ModelSection(
        **{"d_model": 16, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY, "sequence_length": LENGTH, "local_window_size": 8, **overrides}
    )
    model = build_model(section, dtype=torch.float32, device=CPU)
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # predictions that differ, and paths that matter
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [SENTENCE * 3, "some more words of a text"]
    return load_tokenizer(train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=300))


@pytest.fixture
def prefixes(tmp_path):
    """Two sources of random documents, 35 to 200 tokens long: 1,041 tokens and 330."""
    for name, sizes in (("a", [35, 200, 90, 41, 180, 175, 160, 160]), ("b", [70, 60, 200])):
        generator = np.random.default_rng(len(sizes))
        with IndexedWriter(tmp_path / name, dtype=np.dtype(np.uint16)) as writer:
            for size in sizes:
                writer.add_document(generator.integers(0, VOCABULARY, size=size))
    return [tmp_path / name for name in "ab"]


def pairs(prefixes, *, resets=False, tokenizer=None):
    section = DataSection(reset_at_document_boundaries=resets, cache_dir=str(prefixes[0].parent / "cache"))
    return open_pairs(prefixes, tokenizer, section, vocab_size=VOCABULARY, on_progress=lambda *_: None)


def texts(paths, tokenizer, **options):
    options = {"json_key": "text", "document_separator": None, **options}
    return read_text_sources(paths, tokenizer, on_progress=lambda *_: None, **options)


def measure(model, sources, *, batch_size=4, ranks=None, adjustable=True, **how):
    sources, pieces = select_pieces(sources, length=LENGTH, **how)
    options = {} if ranks is None else {"ranks": ranks}
    return evaluate(model, sources, pieces, Forward(LENGTH, batch_size, is_adjustable=adjustable, device=CPU), **options)


@torch.no_grad()
def losses_by_hand(model, tokens, num_seen):
    """The loss of tokens[i + 1] after the last `num_seen[i]` tokens up to i, in a forward of its own; None: it is not predicted."""
    found = []
    for i, number in enumerate(num_seen):
        if number is None:
            continue
        hidden, _ = model(torch.tensor(tokens[i + 1 - number : i + 1])[None])
        scores = model.logits(hidden[0, -1]).double()
        found.append((number - 1, float(scores.logsumexp(0) - scores[tokens[i + 1]])))
    return found


def assert_is(result, by_hand):
    assert result.num_tokens == len(by_hand)
    assert result.loss == pytest.approx(math.fsum(loss for _, loss in by_hand) / len(by_hand), rel=1e-5)
    for position in result.positions:
        there = [loss for place, loss in by_hand if position.first <= place < position.end]
        assert position.num_tokens == len(there)
        assert position.loss == (pytest.approx(math.fsum(there) / len(there), rel=1e-5) if there else None)


def tokens_of(prefix):
    return np.fromfile(f"{prefix}.bin", np.uint16).astype(np.int64)


@pytest.mark.parametrize("stride", [None, 25])
def test_windows_of_pairs_are_the_means_of_single_predictions(model, prefixes, stride):
    step = stride or LENGTH
    results = measure(model, pairs(prefixes), stride=stride)
    assert [result.name for result in results] == ["a", "b", "total"]
    every = []
    for result, prefix in zip(results, prefixes, strict=False):
        tokens = tokens_of(prefix)
        number = len(tokens) - 1
        ends = [*range(LENGTH, number, step), number]
        seen = [i + 1 if i < LENGTH else i - (next(end for end in ends if end > i) - LENGTH) + 1 for i in range(number)]
        by_hand = losses_by_hand(model, tokens, seen)
        assert_is(result, by_hand)
        every += by_hand
    assert_is(results[-1], every)
    assert results[-1].loss == pytest.approx(sum(r.loss * r.num_tokens for r in results[:2]) / sum(r.num_tokens for r in results[:2]))
    assert results[0].perplexity == math.exp(results[0].loss)


def test_documents_that_see_nothing_of_others_are_not_predicted_from_them(model, prefixes):
    result, _, _ = measure(model, pairs(prefixes, resets=True))
    tokens, number = tokens_of(prefixes[0]), 1040
    begins = np.cumsum([0, 35, 200, 90, 41, 180, 175, 160, 160])
    firsts = [*range(0, number - LENGTH, LENGTH), number - LENGTH]
    by_hand = []
    for i in range(number):
        window = max(first for first in firsts[: i // LENGTH + 1]) if i // LENGTH < len(firsts) else firsts[-1]
        number_seen = i + 1 - max(window, begins[begins <= i][-1])
        if i + 1 not in begins:
            by_hand.append((i - window, losses_by_hand(model, tokens[i + 1 - number_seen : i + 2], [None] * (number_seen - 1) + [number_seen])[0][1]))
    assert_is(result, by_hand)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("block", ["phase8", "transformer"])
def test_a_carried_state_equals_the_whole_document_at_once(prefixes, resets, block):
    model = tiny_model(block=block)
    result, _, _ = measure(model, pairs(prefixes, resets=resets), carry_state=True)
    tokens, begins = tokens_of(prefixes[0]), np.cumsum([0, 35, 200, 90, 41, 180, 175, 160, 160]).tolist()
    by_hand = []
    for first, end in zip(begins, begins[1:], strict=False):
        document = torch.from_numpy(tokens[first if resets or not first else first - 1 : end])
        with torch.no_grad():
            scores = model.logits(model(document[None, :-1])[0])[0].double()
        losses = scores.logsumexp(1) - scores.gather(1, document[1:, None])[:, 0]
        by_hand += enumerate(losses.tolist())
    assert_is(result, by_hand)
    assert result.positions[-1].end == 200 - resets and result.num_sequences == 8


def test_texts_are_read_each_by_itself_and_their_bytes_counted(model, tokenizer, tmp_path):
    (tmp_path / "one.txt").write_text(SENTENCE * 4)
    (tmp_path / "two.jsonl").write_text('{"text": "naïve 日本"}\n{"text": ""}\n{"text": "words 🙂"}\n')
    paths = [tmp_path / "one.txt", tmp_path / "two.jsonl"]
    one, two, total = measure(model, texts(paths, tokenizer), carry_state=True)
    documents = [[SENTENCE * 4], ["naïve 日本", "words 🙂"]]
    for result, found in zip((one, two), documents, strict=True):
        by_hand = []
        for document in found:
            tokens = [tokenizer.eod_id, *tokenizer.encode(document)]
            by_hand += losses_by_hand(model, tokens, range(1, len(tokens)))
        assert_is(result, by_hand)
        assert result.num_bytes == sum(len(document.encode()) for document in found)
        bits = math.fsum(loss for _, loss in by_hand) / math.log(2)
        assert result.bits_per_byte == pytest.approx(bits / result.num_bytes, rel=1e-5)
    assert (one.num_sequences, two.num_sequences, total.num_bytes) == (1, 2, one.num_bytes + two.num_bytes)
    windows = measure(model, texts(paths, tokenizer))
    assert [(each.num_tokens, each.num_bytes) for each in windows] == [(each.num_tokens, each.num_bytes) for each in (one, two, total)]


def write_pair(prefix, tokenizer, documents, *, named=True):
    maker = made_with(tokenizer, eod_id=tokenizer.eod_id) if named else None
    with IndexedWriter(prefix, dtype=np.dtype(np.uint16), made_with=maker) as writer:
        for document in documents:
            writer.add_document(np.array([*tokenizer.encode(document), tokenizer.eod_id]))
    return prefix


def test_bytes_of_a_pair_are_those_of_its_predicted_tokens(model, tokenizer, tmp_path):
    documents = [SENTENCE, SENTENCE * 3, "日本 ▁ \t end"]
    prefix = write_pair(tmp_path / "pair", tokenizer, documents)
    first = len(tokenizer.decode(tokenizer.encode(SENTENCE)[:1]).encode())
    (whole,) = measure(model, pairs([prefix], tokenizer=tokenizer))
    assert whole.num_bytes == sum(len(document.encode()) for document in documents) - first
    (some,) = measure(model, pairs([prefix], tokenizer=tokenizer), num_sequences=1)  # ends where a character may not
    assert some.num_tokens == LENGTH and 0 < some.num_bytes < whole.num_bytes
    (resets,) = measure(model, pairs([prefix], tokenizer=tokenizer, resets=True), carry_state=True)
    firsts = sum(len(tokenizer.decode(tokenizer.encode(document)[:1]).encode()) for document in documents)
    assert resets.num_bytes == whole.num_bytes + first - firsts


def test_bytes_that_nobody_knows_are_not_guessed(model, tokenizer, tmp_path):
    unnamed = write_pair(tmp_path / "unnamed", tokenizer, [SENTENCE], named=False)
    named = write_pair(tmp_path / "named", tokenizer, [SENTENCE])
    results = measure(model, pairs([unnamed, named], tokenizer=tokenizer))
    assert [result.bits_per_byte is None for result in results] == [True, False, True]
    assert measure(model, pairs([named]))[0].bits_per_byte is None  # a model without a tokenizer
    assert "| unnamed | " in table(results) and " | unknown | " in table(results)


def test_neither_batches_nor_the_order_of_sources_matter(model, prefixes):
    expected = measure(model, pairs(prefixes), batch_size=1)
    for found in (measure(model, pairs(prefixes), batch_size=7), measure(model, pairs(prefixes[::-1]), batch_size=3)):
        for result in expected:
            other = next(each for each in found if each.name == result.name)
            assert other.num_tokens == result.num_tokens and other.loss == pytest.approx(result.loss, rel=1e-6)


def of_rank(directory, carry_state):
    from torch.distributed.device_mesh import init_device_mesh

    ranks = Axis(init_device_mesh("cpu", (2,)))
    return measure(tiny_model(), pairs([directory / name for name in "ab"]), ranks=ranks, batch_size=2, carry_state=carry_state)


@pytest.mark.parametrize("carry_state", [False, True])
def test_two_ranks_find_what_one_finds(pool, prefixes, carry_state):  # noqa: F811
    expected = measure(tiny_model(), pairs(prefixes), batch_size=2, carry_state=carry_state)
    for found in pool.run(of_rank, prefixes[0].parent, carry_state, world_size=2):
        for result, one in zip(found, expected, strict=True):
            assert dataclasses.replace(result, loss=0, positions=()) == dataclasses.replace(one, loss=0, positions=())
            assert result.loss == pytest.approx(one.loss, rel=1e-12)
            assert [position.num_tokens for position in result.positions] == [position.num_tokens for position in one.positions]


def test_a_batch_that_does_not_fit_is_halved_and_nothing_counted_twice(model, prefixes, monkeypatch):
    expected, sizes, losses = measure(model, pairs(prefixes)), [], score._losses

    def fits_two(model, tokens, *arguments, **options):
        sizes.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError
        return losses(model, tokens, *arguments, **options)

    monkeypatch.setattr(score, "_losses", fits_two)
    found = measure(model, pairs(prefixes), batch_size=8)
    assert sizes[:3] == [8, 4, 2] and set(sizes[2:]) <= {1, 2}
    assert [result.num_tokens for result in found] == [result.num_tokens for result in expected]
    assert [result.loss for result in found] == pytest.approx([result.loss for result in expected], rel=1e-6)
    with pytest.raises(OutOfMemoryError, match="8 sequences of 70 tokens do not fit into the device's memory; give a smaller --batch-size"):
        measure(model, pairs(prefixes), batch_size=8, adjustable=False)


def test_parts_of_the_logits_add_up(model, prefixes, monkeypatch):
    expected = measure(model, pairs(prefixes))
    monkeypatch.setattr(score, "_LOGITS_AT_ONCE", 100 * VOCABULARY)
    assert [result.loss for result in measure(model, pairs(prefixes))] == pytest.approx([result.loss for result in expected], rel=1e-6)


def test_what_cannot_be_evaluated_is_refused(model, prefixes, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="--stride is 71, but a window has 70 tokens"):
        measure(model, pairs(prefixes), stride=71)
    short = write_pair(tmp_path / "short", tokenizer, ["word"])
    with pytest.raises(DataError, match="short holds . tokens, fewer than the 71 of one sequence"):
        measure(model, pairs([short]), num_sequences=4)
    with IndexedWriter(tmp_path / "single", dtype=np.dtype(np.uint16)) as writer:
        writer.add_document(np.array([5]))
    with pytest.raises(DataError, match="single holds 1 tokens, but a prediction takes two"):
        pairs([tmp_path / "single"])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty\.txt holds no text"):
        texts([tmp_path / "empty.txt"], tokenizer)
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 text"):
        texts([tmp_path / "latin.txt"], tokenizer)


def test_ranges_of_positions_double():
    assert position_bounds(24) == [0, 24] and position_bounds(64) == [0, 64] and position_bounds(300) == [0, 64, 128, 256, 300]


def test_numbers_that_are_none_are_null_in_json():
    result = source_result("a", loss_sums=[math.nan], num_tokens=[3], num_bytes=2, num_sequences=1, bounds=[0, 8])
    assert [result.as_json()[key] for key in ("loss", "perplexity", "bits_per_byte")] == [None, None, None]
    assert source_result("a", loss_sums=[3000.0], num_tokens=[3], num_bytes=2, num_sequences=1, bounds=[0, 8]).as_json()["perplexity"] is None
