"""Tables in files, read row by row: JSON lines, CSV, TSV and Parquet.

JSON: an object a line, or a file that is one list of objects or of strings. CSV: RFC 4180, so that a field in quotes
may hold commas and line ends. TSV: a line is a row and a tab ends a field; a field that stands in quotes as a whole,
with quotes inside doubled, is taken out of them as spreadsheets write it, and any other quote is text. Where that does
not give every row as many fields as there are columns, the file is read as CSV with tabs. The first row of CSV and TSV
names the columns; a CSV whose first row holds semicolons or tabs and no comma is refused. No cell is a missing value:
`null`, `NA` and `None` are text.
"""

import contextlib
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from app.data.columns import Row
from app.data.unpacked import check_text, open_text
from models.errors import UserError
from models.parsing import unique_keys

ARROW_ERRORS = (pyarrow.ArrowException, OSError, UnicodeDecodeError)  # of a file that is damaged
_LOOKED_AT = 1000  # rows that tell what a column holds
NUMERIC = "numeric text"  # the type of a column of CSV or TSV in which all cells look like numbers
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_JSON_TYPES = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}


class Table(NamedTuple):
    """Reader of the files of one kind.

    columns: file -> name and type of every column, none where the file has no rows; `string` and NUMERIC are text.
    texts: (file, column) -> the text of every row, empty where a row has none.
    rows: (file, whether its first row names the columns) -> the place of every row, and its cells by column.
    """

    columns: Callable[[Path], dict[str, str]]
    texts: Callable[[Path, str], Iterator[str]]
    rows: Callable[[Path, bool], Iterator[tuple[str, Row]]]


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with open_text(file) as stream:
        first = next((line for line in stream if not line.isspace()), "")
        if first.lstrip().startswith("["):
            for number, value in enumerate(_parse(first + stream.read(), file, "the list")):
                yield f"item {number}", value
            return
    with open_text(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield f"line {number}", _parse(line, file, f"line {number}")


def _parse(text: str, file: Path, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise UserError(f"source '{file}' cannot be read as json: {where} is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"source '{file}' cannot be read as json: {where}: {error}") from None


def _json_objects(file: Path, header: bool = True) -> Iterator[tuple[str, Row]]:
    for where, row in _json_rows(file):
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise UserError(f"source '{file}', {where}: a row must be an object, not {_json_type(row)}")
        yield where, row


def _json_type(value: Any) -> str:
    return _JSON_TYPES.get(type(value), "null")


def _separated(
    file: Path, rows: Callable[[Any], Iterator[list[str]]], header: bool = True
) -> Iterator[tuple[str, Row]]:
    """The rows of CSV or TSV as objects. Raises UserError for one with more or fewer fields than columns.

    Without a header the columns are called 1, 2, ... and the first row is one of them.
    """
    names: list[str] = []
    with open_text(file) as stream:
        for number, fields in enumerate(rows(stream), 1):
            if not names and not header:
                names = [str(place) for place in range(1, len(fields) + 1)]
            elif not names:
                names = [field or f"column {place}" for place, field in enumerate(fields, 1)]
                if len(set(names)) < len(names):
                    raise UserError(f"source '{file}' names a column twice: {', '.join(names)}")
                continue
            if len(fields) != len(names):
                raise UserError(
                    f"source '{file}', row {number}: {len(fields)} fields, but the first row "
                    f"{'names' if header else 'has'} {len(names)} columns"
                )
            yield f"row {number}", dict(zip(names, fields, strict=True))


def _csv_rows(file: Path, header: bool = True, kind: str = "csv", delimiter: str = ",") -> Iterator[tuple[str, Row]]:
    def rows(stream: Any) -> Iterator[list[str]]:
        csv.field_size_limit(sys.maxsize)  # 131,072 characters by default, for the whole process
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            yield from (fields for fields in reader if fields)
        except csv.Error as error:
            raise UserError(
                f"source '{file}' cannot be read as {kind}: line {reader.line_num}: {error} "
                "(a quote begins a field that another one ends; inside, quotes are doubled)"
            ) from None

    if kind == "csv":
        with open_text(file) as stream:
            first = next((line for line in stream if line != "\n"), "")
        if "," not in first and (found := next((sign for sign in ";\t" if sign in first), None)):
            raise UserError(
                f"source '{file}': its first row has no comma but {'semicolons' if found == ';' else 'tabs'}, and the "
                "fields of CSV are separated by commas; write it with commas, or with tabs and the ending .tsv"
            )
    return _separated(file, rows, header)


def _tsv_rows(file: Path, header: bool = True) -> Iterator[tuple[str, Row]]:
    def rows(stream: Any) -> Iterator[list[str]]:
        lines = (line.rstrip("\n") for line in stream)
        return ([_unquoted(field) for field in line.split("\t")] for line in lines if line)

    with open_text(file) as lines:
        even = len({line.count("\t") for line in lines if line != "\n"}) < 2
    return _separated(file, rows, header) if even else _csv_rows(file, header, "tsv", "\t")


def _unquoted(field: str) -> str:
    quoted = _QUOTED.fullmatch(field)
    return quoted[1].replace('""', '"') if quoted else field


def _cell_type(cell: str) -> str:
    if not cell:
        return "null"
    return NUMERIC if _NUMBER.fullmatch(cell) else "string"


def _by_rows(read: Callable[..., Iterator[tuple[str, Row]]], type_of: Callable[[Any], str]) -> Table:
    """A table whose rows are read whole."""

    def columns(file: Path) -> dict[str, str]:
        check_text(file)
        types: dict[str, set[str]] = {}
        for _, row in islice(read(file), _LOOKED_AT):
            for name, value in row.items():
                types.setdefault(name, set()).add(type_of(value))
        return {
            name: "string" if "string" in found else ", ".join(sorted(found - {"null"})) or "null"
            for name, found in types.items()
        }

    def texts(file: Path, column: str) -> Iterator[str]:
        for where, row in read(file):
            value = row.get(column)
            if value is not None and not isinstance(value, str):
                raise UserError(f"source '{file}', {where}: '{column}' must be text, not {_json_type(value)}")
            yield value or ""

    def rows(file: Path, header: bool) -> Iterator[tuple[str, Row]]:
        check_text(file)
        return read(file, header)

    return Table(columns, texts, rows)


def _parquet_columns(file: Path) -> dict[str, str]:
    with _parquet(file) as table:
        return {field.name: string_type(field.type) for field in table.schema_arrow}


def _parquet_texts(file: Path, column: str) -> Iterator[str]:
    with _parquet(file) as table:
        for batch in table.iter_batches(batch_size=1000, columns=[column]):
            yield from (text or "" for text in batch.column(0).to_pylist())


def _parquet_rows(file: Path, header: bool) -> Iterator[tuple[str, Row]]:
    with _parquet(file) as table:
        rows = (row for batch in table.iter_batches(batch_size=1000) for row in batch.to_pylist())
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


@contextlib.contextmanager
def _parquet(file: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield table
    except ARROW_ERRORS as error:
        raise UserError(f"source '{file}' cannot be read as parquet: {error}") from error


def string_type(arrow: pyarrow.DataType) -> str:
    """The name of an Arrow type; `string` for each of those that hold text, dictionaries (categories) of it too."""
    value = arrow.value_type if pyarrow.types.is_dictionary(arrow) else arrow
    kinds = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    return "string" if any(kind(value) for kind in kinds) else str(arrow)


TABLES = {
    "json": _by_rows(_json_objects, _json_type),
    "csv": _by_rows(_csv_rows, _cell_type),
    "tsv": _by_rows(_tsv_rows, _cell_type),
    "parquet": Table(_parquet_columns, _parquet_texts, _parquet_rows),
}
