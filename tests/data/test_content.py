import pytest

from phase8.data.content import BLOCK_BYTES, WHOLE_BYTES, content_digest
from phase8.errors import DataError


def test_equal_contents_have_equal_digests_whatever_the_name(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"the same")
    assert content_digest(tmp_path / "a") == content_digest(tmp_path / "b")


@pytest.mark.parametrize("size", [1, 1000, WHOLE_BYTES])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_small_file_is_read_whole(tmp_path, size, place):
    content = bytearray(size)
    (tmp_path / "before").write_bytes(content)
    content[round(place * (size - 1))] ^= 1
    (tmp_path / "after").write_bytes(content)
    before, after = (content_digest(tmp_path / name) for name in ("before", "after"))
    assert before.startswith("sha256:") and before != after


@pytest.mark.parametrize("position", [0, -1, (WHOLE_BYTES * 2 - BLOCK_BYTES) // 255])
def test_a_large_file_is_sampled_from_end_to_end(tmp_path, position):
    content = bytearray(2 * WHOLE_BYTES)
    (tmp_path / "before").write_bytes(content)
    content[position] ^= 1
    (tmp_path / "after").write_bytes(content)
    before, after = (content_digest(tmp_path / name) for name in ("before", "after"))
    assert before.startswith("sampled-sha256:") and before != after


def test_the_size_counts(tmp_path):
    for name, size in (("a", 2 * WHOLE_BYTES), ("b", 2 * WHOLE_BYTES + 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    assert content_digest(tmp_path / "a") != content_digest(tmp_path / "b")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="gone"):
        content_digest(tmp_path / "gone")
