"""The losses of sources: against a loop over single predictions, over windows, documents, ranks and batches."""

import itertools
import math

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import models

from phase8.data.indexed import IndexedWriter
from phase8.data.made_with import made_with
from phase8.data.tokenizer import load_tokenizer
from phase8.data.tokenizer_file import SPACE_MARK
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.errors import ConfigError, DataError, OutOfMemoryError
from phase8.evaluate import score
from phase8.evaluate.results import position_bounds, source_result, table
from tests.evaluate.measuring import DOCUMENTS, LENGTH, VOCABULARY, measure, pairs, texts, tiny_model, write_pairs

SENTENCE = "Größe, 日本語 and naïve 🙂 text; plain words too.\n"
BEGINS = [0, *itertools.accumulate(DOCUMENTS["a"])]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [SENTENCE * 3, "some more words of a text"]
    return load_tokenizer(train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=300))


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """A tokenizer of the characters `a`, `b`, `c` and the space, to which all others are unknown."""
    path = tmp_path_factory.mktemp("characters") / "t.model"
    options = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False, "minloglevel": 2}
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["ab c"] * 9), model_writer=file, vocab_size=7, model_type="char", **options)
    return load_tokenizer(path)


@pytest.fixture
def prefixes(tmp_path):
    return write_pairs(tmp_path)


@torch.no_grad()
def losses_by_hand(model, readings):
    """The loss of the last token of each reading after all tokens before it, with a forward of its own; readings of one length side by side."""
    losses = {}
    for length in {len(reading) for reading in readings}:
        numbers = [i for i, reading in enumerate(readings) if len(reading) == length]
        rows = torch.tensor(np.stack([readings[i] for i in numbers]))
        scores = model.logits(model(rows[:, :-1])[0][:, -1]).double()
        losses |= zip(numbers, (scores.logsumexp(1) - scores.gather(1, rows[:, -1:])[:, 0]).tolist(), strict=True)
    return [losses[i] for i in range(len(readings))]


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
        firsts = [0 if i < LENGTH else next(end for end in ends if end > i) - LENGTH for i in range(number)]
        losses = losses_by_hand(model, [tokens[first : i + 2] for i, first in enumerate(firsts)])
        by_hand = [(i - first, loss) for i, (first, loss) in enumerate(zip(firsts, losses, strict=True))]
        assert_is(result, by_hand)
        every += by_hand
    assert_is(results[-1], every)
    assert results[-1].loss == pytest.approx(sum(r.loss * r.num_tokens for r in results[:2]) / sum(r.num_tokens for r in results[:2]))
    assert results[0].perplexity == math.exp(results[0].loss)


def test_documents_that_see_nothing_of_others_are_not_predicted_from_them(model, prefixes):
    result, _, _ = measure(model, pairs(prefixes, resets=True))
    tokens, number = tokens_of(prefixes[0]), BEGINS[-1] - 1
    begins = np.array(BEGINS)
    firsts = [*range(0, number - LENGTH, LENGTH), number - LENGTH]
    places, readings = [], []
    for i in range(number):
        window = firsts[min(i // LENGTH, len(firsts) - 1)]
        if i + 1 not in begins:
            places.append(i - window)
            readings.append(tokens[max(window, begins[begins <= i][-1]) : i + 2])
    by_hand = list(zip(places, losses_by_hand(model, readings), strict=True))
    assert_is(result, by_hand)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("block", ["phase8", "transformer"])
def test_a_carried_state_equals_the_whole_document_at_once(prefixes, resets, block):
    model = tiny_model(block=block)
    result, _, _ = measure(model, pairs(prefixes, resets=resets), carry_state=True)
    tokens, by_hand = tokens_of(prefixes[0]), []
    for first, end in itertools.pairwise(BEGINS):
        document = torch.from_numpy(tokens[first if resets or not first else first - 1 : end])
        with torch.no_grad():
            scores = model.logits(model(document[None, :-1])[0])[0].double()
        losses = scores.logsumexp(1) - scores.gather(1, document[1:, None])[:, 0]
        by_hand += enumerate(losses.tolist())
    assert_is(result, by_hand)
    assert result.positions[-1].end == 120 - resets and result.num_sequences == 4


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
            by_hand += enumerate(losses_by_hand(model, [np.array(tokens[:end]) for end in range(2, len(tokens) + 1)]))
        assert_is(result, by_hand)
        assert result.num_bytes == sum(len(document.encode()) for document in found)
        bits = math.fsum(loss for _, loss in by_hand) / math.log(2)
        assert result.bits_per_byte == pytest.approx(bits / result.num_bytes, rel=1e-5)
    assert (one.num_sequences, two.num_sequences, total.num_bytes) == (1, 2, one.num_bytes + two.num_bytes)
    windows = measure(model, texts(paths, tokenizer))
    assert [(each.num_tokens, each.num_bytes) for each in windows] == [(each.num_tokens, each.num_bytes) for each in (one, two, total)]


def write_pair(prefix, tokenizer, documents, *, named=True, eod_id=None):
    maker = made_with(tokenizer, eod_id=tokenizer.eod_id if eod_id is None else eod_id) if named else None
    with IndexedWriter(prefix, dtype=np.dtype(np.uint16), made_with=maker) as writer:
        for document in documents:
            writer.add_document(np.array([*tokenizer.encode(document), tokenizer.eod_id]))
    return prefix


def test_bytes_of_a_pair_are_those_of_its_predicted_tokens(model, tokenizer, tmp_path):
    documents = [SENTENCE, SENTENCE * 3, f"日本 {SPACE_MARK} \t end"]
    prefix = write_pair(tmp_path / "pair", tokenizer, documents)
    first = len(tokenizer.decode(tokenizer.encode(SENTENCE)[:1]).encode())
    (whole,) = measure(model, pairs([prefix], tokenizer=tokenizer))
    assert whole.num_bytes == sum(len(document.encode()) for document in documents) - first
    (some,) = measure(model, pairs([prefix], tokenizer=tokenizer), num_sequences=1)  # ends where a character may not
    assert some.num_tokens == LENGTH and 0 < some.num_bytes < whole.num_bytes
    (resets,) = measure(model, pairs([prefix], tokenizer=tokenizer, resets=True), carry_state=True)
    firsts = sum(len(tokenizer.decode(tokenizer.encode(document)[:1]).encode()) for document in documents)
    assert resets.num_bytes == whole.num_bytes + first - firsts


def test_bytes_that_nobody_knows_are_not_guessed(model, tokenizer, characters, tmp_path):
    foreign = write_pair(tmp_path / "foreign", characters, ["ab c"])
    assert measure(model, pairs([foreign], tokenizer=characters))[0].num_bytes == 3  # all but the first
    unknown = write_pair(tmp_path / "unknown", characters, ["ab d"])
    assert measure(model, pairs([unknown], tokenizer=characters))[0].num_bytes is None
    unnamed = write_pair(tmp_path / "unnamed", tokenizer, [SENTENCE], named=False)
    named = write_pair(tmp_path / "named", tokenizer, [SENTENCE])
    results = measure(model, pairs([unnamed, named], tokenizer=tokenizer))
    assert [result.bits_per_byte is None for result in results] == [True, False, True]
    assert measure(model, pairs([named]))[0].bits_per_byte is None  # a model without a tokenizer
    assert "| unnamed | " in table(results) and " | unknown | " in table(results)


def test_pairs_of_another_tokenizer_are_refused_as_in_training(tokenizer, characters, tmp_path):
    """Their loss was printed, although an id means other text there."""
    for name in ("first", "last"):
        write_pair(tmp_path / f"own_{name}", tokenizer, [SENTENCE])
    unnamed = write_pair(tmp_path / "unnamed", characters, ["ab c"], named=False)
    foreign = write_pair(tmp_path / "own_middle", characters, ["ab c"])
    for given in ([foreign], [tmp_path / "own_first", foreign], [tmp_path / "own_*"]):
        with pytest.raises(DataError) as caught:
            pairs(given, tokenizer=tokenizer)
        assert str(caught.value) == (
            f"{foreign} was made with a tokenizer of sha256 {characters.sha256[:12]}, but that of the evaluation's {tokenizer.path} is "
            f"{tokenizer.sha256[:12]}; give pairs that it has made, or name the tokenizer of these with --tokenizer if its ids mean the same"
        )
    ended = write_pair(tmp_path / "ended", tokenizer, [SENTENCE], eod_id=5)
    with pytest.raises(DataError, match=rf"documents of {ended} end in token 5, but those of .*; name the piece of the data with --eod-token"):
        pairs([ended], tokenizer=tokenizer)
    assert len(pairs([unnamed, tmp_path / "own_first"], tokenizer=tokenizer)) == 2  # what no record says
    assert len(pairs([unnamed, tmp_path / "own_*"])) == 2  # a model without a tokenizer
    (accepted,) = pairs([foreign], tokenizer=tokenizer, allow_fingerprint_change=True)  # a model that was trained so
    assert accepted.bytes_per_id is None


def test_texts_with_unknown_tokens_have_no_known_bytes(model, characters, tmp_path):
    for name, text in (("known", "a b"), ("unknown", "a d")):
        (tmp_path / name).write_text(text)
    results = measure(model, texts([tmp_path / "known", tmp_path / "unknown"], characters))
    assert [result.num_bytes for result in results] == [3, None, None]


@pytest.mark.parametrize("unknown", [None, "<|endoftext|>"])
def test_bytes_of_a_text_are_known_only_if_its_tokens_hold_all_of_it(model, unknown, tmp_path):
    """Characters that the tokenizer dropped counted as bytes, though nobody had predicted them; and an end of a document as unknown text."""
    algorithm = models.BPE(vocab={"a": 0, "b": 1, " ": 2, "<|endoftext|>": 3}, merges=[], unk_token=unknown)
    characters = tokenizers.Tokenizer(algorithm)
    characters.add_special_tokens(["<|endoftext|>"])
    characters.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "whole").write_text("ab ab")
    (tmp_path / "dropped.jsonl").write_text('{"text": "ab ab"}\n' + ('{"text": "日本"}\n{"text": "ab 日本 ab"}\n' if unknown is None else ""))
    results = measure(model, texts([tmp_path / "whole", tmp_path / "dropped.jsonl"], load_tokenizer(tmp_path / "tokenizer.json")))
    assert [result.num_bytes for result in results] == ([5, None, None] if unknown is None else [5, 5, 10])


def test_neither_batches_nor_the_order_of_sources_matter(model, prefixes):
    expected = measure(model, pairs(prefixes), batch_size=1)
    for found in (measure(model, pairs(prefixes), batch_size=7), measure(model, pairs(prefixes[::-1]), batch_size=3)):
        for result in expected:
            other = next(each for each in found if each.name == result.name)
            assert other.num_tokens == result.num_tokens and other.loss == pytest.approx(result.loss, rel=1e-6)


def test_a_batch_that_does_not_fit_is_halved_and_nothing_counted_twice(model, prefixes, monkeypatch):
    expected, sizes, losses = measure(model, pairs(prefixes)), [], score._losses

    def fits_three(model, tokens, *arguments, **options):
        sizes.append(len(tokens))
        if len(tokens) > 3:
            raise torch.OutOfMemoryError
        return losses(model, tokens, *arguments, **options)

    monkeypatch.setattr(score, "_losses", fits_three)
    found = measure(model, pairs(prefixes), batch_size=8)
    assert sizes == [7, 3, 3, 1]
    assert [result.num_tokens for result in found] == [result.num_tokens for result in expected]
    assert [result.loss for result in found] == pytest.approx([result.loss for result in expected], rel=1e-6)
    with pytest.raises(OutOfMemoryError, match="7 sequences of 70 tokens do not fit into the device's memory; give a smaller --batch-size"):
        measure(model, pairs(prefixes), batch_size=8, adjustable=False)


@pytest.mark.parametrize("name", ["bucketize", "ones_like"])
def test_a_batch_that_ran_out_of_memory_at_its_end_is_not_counted_twice(model, prefixes, monkeypatch, name):
    """Its losses were added before the memory for its counts was there, and again by its halves."""
    expected, original = measure(model, pairs(prefixes)), getattr(torch, name)

    def fails_once(*arguments, **options):
        monkeypatch.setattr(torch, name, original)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, name, fails_once)
    found = measure(model, pairs(prefixes), batch_size=8)
    assert getattr(torch, name) is original
    assert [result.num_tokens for result in found] == [result.num_tokens for result in expected]
    assert [result.loss for result in found] == pytest.approx([result.loss for result in expected], rel=1e-6)


def test_parts_of_the_logits_add_up(model, prefixes, monkeypatch):
    expected = measure(model, pairs(prefixes))
    monkeypatch.setattr(score, "_LOGITS_AT_ONCE", 100 * VOCABULARY)
    assert [result.loss for result in measure(model, pairs(prefixes))] == pytest.approx([result.loss for result in expected], rel=1e-6)


def test_what_cannot_be_evaluated_is_refused(model, prefixes, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="--stride is 71, but a window has 70 tokens"):
        measure(model, pairs(prefixes), stride=71)
    short = write_pair(tmp_path / "short", tokenizer, ["word"])
    with pytest.raises(DataError, match=r"short holds \d+ tokens, fewer than the 71 of one sequence"):
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


def test_what_a_directory_holds_besides_texts_is_said(tmp_path, tokenizer):
    for name in ("a.txt", ".b.txt", "c.pdf"):
        (tmp_path / name).write_text("some text")
    said: list[str] = []
    (source,) = texts([tmp_path], tokenizer, on_message=said.append)
    assert source.text_bytes == len("some text")
    assert len(said) == 1
    assert said[0].startswith(f"--text {tmp_path}: not everything below the inputs is read: 1 file has no suffix of text (.pdf: 1), 1 file is hidden")
