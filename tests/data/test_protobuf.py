"""The wire format of protocol buffers, by a message of Google's documentation and by models of sentencepiece."""

import pytest
from sentencepiece import SentencePieceProcessor

from phase8.data.protobuf import fields, varint
from tests.tools.test_reshard_from_hf import small_sentencepiece


def test_every_kind_of_field():
    message = bytes.fromhex("089601" "120774657374696e67" "1d0000803f" "21000000000000f03f" "8001" "ffffffffffffffffff01")
    assert list(fields(message)) == [(1, 150), (2, b"testing"), (3, 1.0), (4, 1.0), (16, 2**64 - 1)]
    assert varint(b"\x00\x96\x01\x07", 1) == (150, 3)


@pytest.mark.parametrize(("message", "error"), [("0b", ValueError), ("08ff", IndexError), ("1205", None)])
def test_what_is_no_message(message, error):
    if error is None:  # bytes that are missing at the end are missing in the value
        assert list(fields(bytes.fromhex(message))) == [(2, b"")]
    else:
        with pytest.raises(error):
            list(fields(bytes.fromhex(message)))


def test_pieces_of_a_model():
    model = small_sentencepiece()
    processor = SentencePieceProcessor(model_proto=model)
    pieces = [dict(fields(value)) for number, value in fields(model) if number == 1]
    assert [piece[1].decode() for piece in pieces] == [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    assert [piece[2] for piece in pieces] == [processor.get_score(i) for i in range(processor.vocab_size())]
