"""Documents of Parquet files: a row is a document, its text stands in a column."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from phase8.data.input_files import Document, OnInvalid, Span, describe_keys
from phase8.data.optional_packages import import_for, import_parquet
from phase8.errors import DataError

_ROWS_AT_ONCE = 64  # texts may be long: only these, and the pages that hold them, are in memory


def read_parquet(span: Span, *, column: str, on_invalid: OnInvalid) -> Iterator[Document]:
    """Yields the texts of the row groups of a span. Row group i of n belongs to the span that holds byte `size * i // n`.

    Args:
        span: What to read.
        column: The column of the text.
        on_invalid: Called with an error naming file and row for everything that is not a document; it raises to stop there, or
            returns to skip it.

    Raises:
        DataError: pyarrow is not installed, or the file cannot be read at all.
    """
    path, size = span.source.path, span.source.size_bytes
    arrow, parquet = import_for(path, "pyarrow", "a Parquet file"), import_parquet(path)
    damage = (arrow.ArrowException, OSError, ValueError)

    def report(problem: str) -> None:
        on_invalid(DataError(f"{path}{problem}"))

    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        problem = _problem_of_column(arrow, file.schema_arrow, column)
    except damage as error:
        file, problem = None, f" is not a whole Parquet file ({_one_line(error)}); write or copy it again"
    if problem is not None:
        if span.start == 0:  # the first span alone reports what is wrong with the whole file
            report(problem)
        return
    with file:
        num_groups, first_row = file.num_row_groups, 0
        for i in range(num_groups):
            begin, end = size * i // num_groups, size * (i + 1) // num_groups
            num_rows = file.metadata.row_group(i).num_rows
            if span.start <= begin < span.end:
                try:
                    for row, (text, problem) in enumerate(_texts_of_group(file, i, column), first_row):
                        if problem:
                            report(f", row {row} (the first is 0): {column!r} holds {problem}; leave such rows out")
                        else:
                            yield Document(text, (end - begin) // num_rows)
                except damage as error:
                    report(f": row group {i}, from row {first_row} on, cannot be read to its end ({_one_line(error)}); write or copy the file again")
            first_row += num_rows


def _problem_of_column(arrow: Any, schema: Any, column: str) -> str | None:
    """What is wrong with a column, or None."""
    indices = schema.get_all_field_indices(column)
    if len(indices) != 1:
        number = f"{len(indices)} columns" if indices else "no column"
        return f" has {number} named {column!r}; name the column of the text with --json-key, it has {describe_keys(schema.names)}"
    found = schema.field(indices[0]).type
    values = found.value_type if arrow.types.is_dictionary(found) else found
    if not (arrow.types.is_string(values) or arrow.types.is_large_string(values) or arrow.types.is_string_view(values)):
        return f": the column {column!r} holds {found}, not strings; name the column of the text with --json-key"
    return None


def _texts_of_group(file: Any, group: int, column: str) -> Iterator[tuple[str, str]]:
    """The text of every row; for a row without text an empty one, and what it holds instead."""
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False):
        for value in batch.column(column):
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                yield "", f"bytes that are not UTF-8 (0x{error.object[error.start]:02x} at byte {error.start})"
            else:
                yield ("", "nothing (null)") if text is None else (text, "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
