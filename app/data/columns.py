"""Rows with a label: the columns of a table that hold the texts and the label of an example.

A document of such a source is a JSON list of the row's texts and its label, so that splits, hashes and caches are those
of any other corpus.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from models.errors import UserError

Row = dict[str, Any]


class RowColumns(NamedTuple):
    """Columns of an example, by name, or by number from 1 in a CSV or TSV file without a header row."""

    texts: tuple[str, ...]
    label: str

    @property
    def names(self) -> tuple[str, ...]:
        return *self.texts, self.label

    @property
    def numbered(self) -> bool:
        """Whether they are numbers, and the first row is data like any other."""
        return all(name.isdecimal() for name in self.names)

    def document(self, row: Row, where: str, file: str | Path) -> str:
        """The texts and the label of a row as one document. Raises UserError for a row that lacks one."""
        for name in self.names:
            if name not in row:
                raise UserError(f"source '{file}', {where}: there is no column '{name}'{self._hint(row)}")
        cells = [_text(row[name], f"source '{file}', {where}: '{name}'") for name in self.names]
        cells[-1] = cells[-1].strip()
        if not cells[-1]:
            raise UserError(f"source '{file}', {where}: the label ('{self.label}') is empty; every row needs one")
        return json.dumps(cells, ensure_ascii=False)

    def _hint(self, row: Row) -> str:
        if not self.numbered:
            return f"; its columns are {', '.join(row)} (of a file without a header row give numbers, from 1)"
        if "0" in self.names:
            return "; columns are counted from 1"
        return f"; its columns are {', '.join(row)}"


def _text(cell: Any, where: str) -> str:
    if isinstance(cell, list | dict):
        raise UserError(f"{where} must be text or a number, not a {type(cell).__name__}")
    if isinstance(cell, bool):
        return str(cell).lower()
    return "" if cell is None else str(cell)


def read_document(text: str) -> tuple[list[str], str]:
    """The texts and the label of a document that `RowColumns.document` made."""
    *texts, label = json.loads(text)
    return texts, label


def row_documents(
    rows: Callable[[], Iterator[tuple[str, Row]]], columns: RowColumns, name: str, file: str | Path
) -> Iterator[tuple[str, str]]:
    """Name and document of every row; `rows` gives each with its place in the file."""
    for where, row in rows():
        yield f"{name}, {where}", columns.document(row, where, file)
