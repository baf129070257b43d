"""Files of cells: delimited text and spreadsheets become a header and numbered rows of text."""

from __future__ import annotations

import csv
import gzip
import io
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from perdure.errors import ConfigError, DataError
from perdure.storage import there

TEXT_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
SUFFIXES = (*TEXT_SUFFIXES, ".xlsx")
MOST_BYTES = 1 << 30  # of text, unpacked; all of it is held in memory
SHOWN = 10


@dataclass(frozen=True, slots=True)
class Cells:
    """A file's cells.

    Attributes:
        path: of the file.
        header: names of the columns, all different; an index column without a name is left out.
        rows: the line (or the spreadsheet's row) that each begins on, from 1, and its cells as text, by column.
    """

    path: Path
    header: tuple[str, ...]
    rows: tuple[tuple[int, dict[str, str]], ...]


class Problems:
    """What is wrong with the lines of a file, gathered so that it is told together."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, list[tuple[int, str]]()

    def add(self, line: int, message: str) -> None:
        """Note what is wrong with a line."""
        self.found.append((line, message))

    def stop(self) -> None:
        """Raise a DataError for all that was found, the first lines of it in words; nothing where there is none."""
        if self.found:
            told = [f"{self.path}:{line}: {message}" for line, message in sorted(self.found, key=itemgetter(0))]
            more = f"\n(and {len(told) - SHOWN} more)" if len(told) > SHOWN else ""
            raise DataError("malformed table; correct or remove:\n" + "\n".join(told[:SHOWN]) + more)


def read_cells(path: Path, sheet: str | None = None) -> Cells:
    """All cells of a file as text without spaces about them; rows that are empty throughout are passed over.

    Args:
        path: `.csv` or `.tsv` (a comma, a semicolon or a tab parts the columns, as the header shows), also `.gz`,
            or `.xlsx`.
        sheet: name of a spreadsheet's sheet; default: the first.

    Raises:
        DataError: nothing is there, or it cannot be read; names file and line.
        ConfigError: a spreadsheet, and openpyxl is not installed.
    """
    if not there(path):
        raise DataError(f"{path}: no such file. Check the path.")
    name = path.name.lower()
    if path.is_dir() or not name.endswith(SUFFIXES):
        raise DataError(
            f"{path}: not a table of reactions. The name must end in {', '.join(SUFFIXES)}; "
            "save an older spreadsheet as .xlsx or as CSV (UTF-8)."
        )
    try:
        if name.endswith(".xlsx"):
            lines = _spreadsheet(path, sheet)
        elif sheet is not None:
            raise DataError(f"{path}: sheet={sheet!r} was given, but text has no sheets. Leave it out.")
        else:
            lines = _text(path, _content(path))
    except PermissionError as error:
        raise DataError(f"{path}: may not be read ({error.strerror}). Change its permissions.") from error
    return _cells(path, [(line, cells) for line, cells in lines if any(cells)])


def _content(path: Path) -> str:
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file ({error}). Download or compress it again.") from error
    if len(content) > MOST_BYTES:
        raise _too_large(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}). Save it again as CSV (UTF-8)."
        ) from error


def _too_large(path: Path) -> DataError:
    return DataError(f"{path}: more than {MOST_BYTES:,} bytes of cells. Keep the rows you need, in a smaller file.")


def _text(path: Path, content: str) -> list[tuple[int, list[str]]]:
    first = next((line for line in content.splitlines() if line.strip()), "")
    # The field limit is the csv module's own global.
    before = csv.field_size_limit(MOST_BYTES)
    try:
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=_delimiter(first), strict=True)
        lines: list[tuple[int, list[str]]] = []
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return lines
            except csv.Error as error:
                # After a wrong quote the rest of the file cannot be told apart.
                raise DataError(f"{path}:{line}: not CSV: {error}. Double a quote inside a quoted text.") from error
            lines.append((line, [cell.strip() for cell in cells]))
    finally:
        csv.field_size_limit(before)


def _delimiter(header: str) -> str:
    """A tab where there is one; else what parts the header into more columns, the comma if both do."""
    if "\t" in header:
        return "\t"
    return max(",;", key=lambda mark: len(next(csv.reader([header], delimiter=mark))) if header else 0)


def _spreadsheet(path: Path, sheet: str | None) -> list[tuple[int, list[str]]]:
    try:
        import openpyxl
    except ImportError as error:
        raise ConfigError(
            f'{path}: spreadsheets need openpyxl; it is in an extra: pip install "perdure[chem]". '
            "Or save the sheet as CSV (UTF-8)."
        ) from error
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MOST_BYTES:
                raise _too_large(path)
        with warnings.catch_warnings():
            # It warns of formats and validations that it does not keep; only the cells are wanted.
            warnings.simplefilter("ignore")
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            try:
                if sheet is not None and sheet not in book.sheetnames:
                    raise DataError(f"{path}: no sheet {sheet!r}. It has {', '.join(book.sheetnames)}.")
                page = book[sheet or book.sheetnames[0]]
                return [
                    (line, [_text_of(cell) for cell in cells])
                    for line, cells in enumerate(page.iter_rows(values_only=True), 1)
                ]
            finally:
                book.close()
    except (DataError, PermissionError):
        raise
    except Exception as error:  # a damaged one raises many kinds: of zip, of XML, a KeyError for a missing part
        raise DataError(
            f"{path}: not a spreadsheet that can be read ({type(error).__name__}: {error}). "
            "Save it again as .xlsx, or as CSV (UTF-8)."
        ) from error


def _text_of(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))  # a spreadsheet knows no whole numbers: row 7 may come as 7.0
    return str(cell).strip()


def _cells(path: Path, lines: Sequence[tuple[int, list[str]]]) -> Cells:
    if not lines:
        raise DataError(f"{path}: empty. Give a table with a header and at least one row.")
    (top, names), *rest = lines
    while names and not names[-1]:
        names = names[:-1]
    # A data frame's index is written in front, under no name.
    kept = [i for i, name in enumerate(names) if name or i]
    header = tuple(names[i] for i in kept)
    twice = sorted({name for name in header if header.count(name) > 1 or not name})
    if twice:
        raise DataError(f"{path}:{top}: the header needs a name of its own for every column; check {twice}.")
    if not rest:
        raise DataError(f"{path}: holds no rows under its header. Give a table with at least one.")
    problems, rows = Problems(path), []
    for line, cells in rest:
        if len(cells) < len(names) or any(cells[len(names) :]):
            count = f"{len(cells)} cell{'s' * (len(cells) != 1)}"
            way = "quote a text that holds a comma, a semicolon or a tab"
            problems.add(line, f"{count}, but the header has {len(names)}; {way}")
        else:
            rows.append((line, {names[i]: cells[i] for i in kept}))
    problems.stop()
    return Cells(path, header, tuple(rows))
