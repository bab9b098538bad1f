"""The pieces of a SentencePiece model, read from its protocol buffer."""

from collections.abc import Iterator
from pathlib import Path

from surgery.checkpoint.jsonfile import read_small_file
from surgery.errors import CheckpointError

PIECES, PIECE = 1, 1  # field numbers of ModelProto.pieces and SentencePiece.piece
VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5  # wire types


def read_pieces(path: Path) -> dict[str, int]:
    """Return piece to number, in the file's order.

    Raises:
        CheckpointError: the file is no SentencePiece model.

    Source: sentencepiece_model.proto (ModelProto, fields 1 and 1.1) and the encoding page of
    protocol buffers.
    """
    data = memoryview(read_small_file(path))
    try:
        texts = [
            bytes(text).decode()
            for field, piece in _fields(data)
            if field == PIECES
            for inner, text in _fields(piece)
            if inner == PIECE
        ]
    except (ValueError, IndexError) as error:
        raise CheckpointError(path, "is no SentencePiece model", "restore the file") from error
    if not texts:
        raise CheckpointError(path, "holds no pieces", "restore the file")
    return {text: number for number, text in enumerate(texts)}


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and bytes of the fields that have a length, and pass over the others."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == BYTES:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field ends behind its message")
            yield tag >> 3, data[at : at + size]
            at += size
        elif kind == VARINT:
            _, at = _varint(data, at)
        elif kind in (EIGHT, FOUR):
            at += 8 if kind == EIGHT else 4
        else:
            raise ValueError(f"no wire type {kind}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1
