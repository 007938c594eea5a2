"""Raw token files: the same tokens in Megatron's format, documents found again, and one sentence for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phase8.data import raw_tokens
from phase8.data.indexed import IndexedDataset
from phase8.data.raw_tokens import RawReport, import_raw
from phase8.errors import DataError

EOD = 50256
DOCUMENTS = [[5, 6, 7, EOD], [EOD], [8] * 50 + [EOD], [9]]
TOKENS = np.concatenate(DOCUMENTS)


def write(path: Path, dtype: str = "<u2", *, header: bytes = b"", tokens: np.ndarray = TOKENS) -> Path:
    path.write_bytes(header + tokens.astype(dtype).tobytes())
    return path


def llmc_header(magic: int, version: int, count: int = TOKENS.size) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, count
    return header.tobytes()


def convert(source: Path, **options) -> RawReport:
    return import_raw(source, source.parent / "out" / "x", **{"dtype": None, "eod_id": EOD} | options)


def documents(report: RawReport) -> list[list[int]]:
    dataset = IndexedDataset(report.destination)
    return [np.concatenate(dataset.document(k)).tolist() for k in range(dataset.num_documents)]


@pytest.fixture(params=[1 << 20, 3])
def chunk_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that lie within a chunk, and such that reach over several."""
    monkeypatch.setattr(raw_tokens, "_CHUNK_TOKENS", request.param)


@pytest.mark.usefixtures("chunk_tokens")
@pytest.mark.parametrize(
    ("header", "dtype", "layout"),
    [
        (b"", "uint16", "raw"),
        (b"", "uint32", "raw"),
        (llmc_header(20240520, 1), "uint16", "llm.c"),
        (llmc_header(20240801, 7), "uint32", "llm.c"),
    ],
)
def test_documents_end_behind_the_end_of_document_id(tmp_path: Path, header: bytes, dtype: str, layout: str):
    source = write(tmp_path / "train.bin", dtype, header=header)
    report = convert(source, dtype=dtype if layout == "raw" else None)
    assert documents(report) == DOCUMENTS
    assert (report.layout, report.num_tokens, report.largest_id) == (layout, TOKENS.size, EOD)
    assert (report.num_documents, report.num_documents_ending_in_eod) == (4, 3)
    written = Path(f"{report.destination}.bin").read_bytes()
    assert written == source.read_bytes()[len(header) :]
    assert IndexedDataset(report.destination).dtype == np.dtype("<u2" if dtype == "uint16" else "<i4")
    assert json.loads(Path(f"{report.destination}.import.json").read_text())["num_documents"] == 4


@pytest.mark.parametrize("tokens", [[0, 0, 0, 0, 5, EOD], [5, 0, 0, 0, 6, EOD], [1, 0, 2, 5, 6, EOD], [5, 0, EOD]])
def test_many_zeros_do_not_make_uint16_look_like_uint32(tmp_path: Path, tokens: list[int]):
    assert convert(write(tmp_path / "a.bin", tokens=np.array(tokens)), dtype="uint16").num_tokens == len(tokens)


@pytest.mark.usefixtures("chunk_tokens")
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_documents_of_datatrove_end_where_its_index_says(tmp_path: Path, dtype: str):
    source = write(tmp_path / "a.ds", dtype)
    ends = [0, 2, 2, 4, 30, 30, TOKENS.size]
    np.array(ends, "<u8").tofile(f"{source}.index")
    (tmp_path / "a.ds.metadata").write_text("gpt2|2\n57\n57 T")
    report = convert(source, eod_id=None)
    assert documents(report) == [TOKENS[a:b].tolist() for a, b in [(0, 2), (2, 4), (4, 30), (30, TOKENS.size)]]
    assert (report.layout, report.source_dtype, report.num_zero_length_documents) == ("datatrove", dtype, 3)
    assert report.num_documents_ending_in_eod is None
    assert convert(source).num_documents_ending_in_eod == 1


@pytest.mark.parametrize(
    ("dtype", "options", "finding"),
    [
        ("<u2", {}, "nothing in .* says of which type its tokens are; give --dtype"),
        ("<u2", {"dtype": "uint16", "eod_id": None}, "nothing in .* says where its documents end; give --eod-id"),
        ("<u2", {"dtype": "uint16", "eod_id": 77}, "the end-of-document id 77 never occurs in the 57 uint16 tokens"),
        ("<u2", {"dtype": "uint16", "eod_id": 65536}, "--eod-id is 65536, outside the type uint16 of .*, which has ids 0 to 65535"),
        ("<u2", {"dtype": "uint16", "eod_id": -1}, "--eod-id is -1, outside the type uint16"),
        ("<u2", {"dtype": "uint16", "vocab_size": 100}, "--eod-id is 50256, outside the vocabulary of the tokenizer, which has ids 0 to 99"),
        ("<u2", {"dtype": "uint16", "vocab_size": 9, "eod_id": 8}, r"holds id 50256 at token 3, where ids below 9 are allowed"),
        ("<u2", {"dtype": "uint32"}, "holds 114 bytes, no whole number of uint32 of 4 bytes"),
        ("<u1", {"dtype": "uint16"}, "holds 57 bytes, no whole number of uint16 of 2 bytes"),
        ("<u4", {"dtype": "uint32", "tokens": [1, 2**31, EOD]}, r"holds id 2147483648 at token 1, where ids below 2147483648 are allowed"),
        ("<u2", {"dtype": "uint16", "tokens": []}, "holds no token"),
        ("<u4", {"dtype": "uint16"}, "looks like uint32 tokens: read as uint16, ids would be 0 at every second place; give --dtype uint32"),
        ("<u4", {"dtype": "uint16", "tokens": [7, 9, 70_000, EOD]}, "ids would be 0 at nearly every second place"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_writes_nothing(tmp_path: Path, dtype: str, options: dict, finding: str):
    source = write(tmp_path / "train.bin", dtype, tokens=np.array(options.pop("tokens", TOKENS)))
    with pytest.raises(DataError, match=finding):
        convert(source, **options)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [source]


@pytest.mark.parametrize(
    ("header", "options", "finding"),
    [
        (llmc_header(20240520, 2), {}, r"like a token file of llm\.c \(magic 20240520\), but with version 2"),
        (llmc_header(20240520, 1, 58), {}, "and 58 tokens in 1138 bytes"),
        (llmc_header(20240801, 7), {}, "and 57 tokens in 1138 bytes"),
        (llmc_header(20240520, 1), {"dtype": "uint32"}, r"holds uint16 tokens by its llm\.c header or index, not uint32"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path, header: bytes, options: dict, finding: str):
    with pytest.raises(DataError, match=finding):
        convert(write(tmp_path / "a.bin", header=header), **options)


@pytest.mark.parametrize("ends", [[], [4, 56], [4, 58], [40, 4, 57], [2**63, 57], [57, 2**64 - 1]])
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, ends: list[int]):
    source = write(tmp_path / "a.ds")
    np.array(ends, "<u8").tofile(f"{source}.index")
    with pytest.raises(DataError, match=r"a\.ds\.index says that .* make up .*a\.ds, but"):
        convert(source)


def test_a_mask_of_losses_is_refused(tmp_path: Path):
    source = write(tmp_path / "a.ds")
    np.array([57], "<u8").tofile(f"{source}.index")
    (tmp_path / "a.ds.loss").write_bytes(bytes(57))
    with pytest.raises(DataError, match=r"a\.ds\.loss masks tokens that give no loss"):
        convert(source)


def test_the_source_is_never_replaced(tmp_path: Path):
    source = write(tmp_path / "x.bin")
    content = source.read_bytes()
    with pytest.raises(DataError, match="would replace its own source"):
        import_raw(source, tmp_path / "x", dtype="uint16", eod_id=EOD)
    assert source.read_bytes() == content


@pytest.mark.parametrize("change", ["other content", "shorter"])
def test_a_source_that_changes_meanwhile_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str):
    monkeypatch.setattr(raw_tokens, "_CHUNK_TOKENS", 5)
    source = write(tmp_path / "a.bin")

    def on_bytes(completed: int, total: int) -> None:
        if completed == 20:
            write(source, tokens=TOKENS[::-1] if change == "other content" else TOKENS[:6])

    with pytest.raises(DataError, match=r"a\.bin (was changed|became shorter) while"):
        convert(source, dtype="uint16", on_bytes=on_bytes)
    assert list((tmp_path / "out").iterdir()) == []


def test_progress_ends_at_the_size_of_the_file(tmp_path: Path):
    seen: list[tuple[int, int]] = []
    source = write(tmp_path / "a.bin", header=llmc_header(20240520, 1))
    convert(source, on_bytes=lambda *amounts: seen.append(amounts))
    assert seen[-1] == (source.stat().st_size, source.stat().st_size)
