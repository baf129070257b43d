"""Rows from a source: a data file, a folder, or a data set on the hub. Knows nothing of tasks or text."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from perdure.errors import DataError
from perdure.storage import file_hash

TEXT_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
HUB_TIMEOUT = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands.

    Attributes:
        values: column name to value.
        file: the file, folder or hub name it came from.
        line: the line its record begins on, from 1; in a parquet file or data set the row's number, from 1.
    """

    values: Mapping[str, Any]
    file: str
    line: int

    @property
    def place(self) -> str:
        """`file:line`, for messages."""
        return f"{self.file}:{self.line}"


class Rows(list[Row]):
    """The rows of one source.

    Args:
        rows: in the order of the source.
        origins: each file with its sha256, or a data set with its fingerprint; kept under this name.
    """

    def __init__(self, rows: Sequence[Row], origins: Mapping[str, str]) -> None:
        super().__init__(rows)
        self.origins = dict(origins)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a file is accepted.

    Attributes:
        line_bytes: bytes of the longest line.
        file_bytes: bytes in all; what is compressed counts as long as it is when unpacked.
        errors: malformed lines that are listed before giving up.
    """

    line_bytes: int = 8 << 20
    file_bytes: int = 8 << 30
    errors: int = 10


def read_rows(
    source: str | Path,
    *,
    split: str | None = None,
    config: str | None = None,
    prefer: Sequence[str] = ("train",),
    limits: Limits = Limits(),
    cache_dir: str | Path | None = None,
) -> Rows:
    """All rows of a source.

    Args:
        source: a `.jsonl`, `.csv` or `.parquet` file (the text ones also `.gz`), a folder written by
            `save_to_disk`, a folder of data files, or a hub name `owner/name[:config]`. A local path wins.
        split: which split of a folder or hub data set; default: its only one, else the first of `prefer`.
        config: the configuration of a hub data set.
        prefer: splits to look for, in order, when `split` is not given.
        limits: of a text file's lines.
        cache_dir: where `datasets` keeps what it prepares; default: its own place.

    Raises:
        DataError: nothing is there, or a line is malformed; names file and line.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split, config, prefer, cache_dir)
    if path.exists():
        if split is not None:
            raise DataError(f"{path}: split={split!r} was given, but a single file has no splits. Leave it out.")
        return _read_file(path, limits)
    name = str(source)
    if not is_hub_name(name):
        raise DataError(
            f"{name}: no such file or folder. Check the path, or give the folder it lies in (--data); "
            f"a hub name has the form owner/name."
        )
    name, _, inner = name.partition(":")
    if config and inner and config != inner:
        raise DataError(f"{source}: the name asks for configuration {inner!r}, config= for {config!r}.")
    return _read_hub(name, split, config or inner or None, prefer, cache_dir)


def is_hub_name(name: str) -> bool:
    """Whether a name can only be meant for the hub: `owner/name[:config]`, and not spelt like a file."""
    return HUB_NAME.fullmatch(name) is not None and not name.endswith((*SUFFIXES, ".json", ".txt", ".gz"))


def _read_file(path: Path, limits: Limits) -> Rows:
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of data file. The name must end in {', '.join(SUFFIXES)}.")
    try:
        if name.endswith(".parquet"):
            rows = _read_parquet(path, limits)
        elif ".csv" in name[-7:]:
            rows = _read_csv(path, limits)
        else:
            rows = _read_jsonl(path, limits)
        if not rows:
            raise DataError(f"{path}: holds no rows. Give a file with at least one.")
        return Rows(rows, {str(path): file_hash(path)})
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file ({error}). Download or compress it again.") from error
    except PermissionError as error:
        raise DataError(f"{path}: may not be read ({error.strerror}). Change its permissions.") from error


class _Problems:
    """Malformed lines of one file, gathered so that they are reported together."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit, self.found = path, limit, list[str]()

    def add(self, line: int, message: str) -> None:
        self.found.append(f"{self.path}:{line}: {message}")
        if len(self.found) >= self.limit:
            self.stop(more=True)

    def stop(self, more: bool = False) -> None:
        if self.found:
            tail = f"\n(the first {self.limit}; there may be more)" if more else ""
            raise DataError("malformed data; correct or remove:\n" + "\n".join(self.found) + tail)


def _lines(path: Path, limits: Limits, problems: _Problems) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, decoded one by one so that a wrong byte has a line number."""
    with _open(path) as file:
        number = size = 0
        while raw := file.readline(limits.line_bytes + 1):
            number += 1
            size += len(raw)
            if size > limits.file_bytes:
                raise too_large(path, limits)
            if len(raw) > limits.line_bytes:
                problems.add(number, f"longer than {limits.line_bytes} bytes; one record must stand on a line")
                problems.stop()
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problems.add(
                    number,
                    f"not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1}); save it as UTF-8",
                )


def too_large(path: Path, limits: Limits) -> DataError:
    """The error for a file beyond the limit; all rows of a file are held in memory."""
    return DataError(
        f"{path}: more than {limits.file_bytes:,} bytes of rows. Keep those that the task needs, in a smaller file."
    )


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _read_jsonl(path: Path, limits: Limits) -> list[Row]:
    problems = _Problems(path, limits.errors)
    rows = []
    for number, line in _lines(path, limits, problems):
        if not line.strip():
            continue
        try:
            values = json.loads(line, parse_constant=_refuse_constant, parse_float=_finite)
            if "\\u" in line:
                json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        except json.JSONDecodeError as error:
            problems.add(number, f"not JSON: {error.msg} at column {error.colno}")
        except UnicodeEncodeError:
            problems.add(number, "holds half of a surrogate pair (\\ud800 to \\udfff), which is no text")
        except (ValueError, RecursionError) as error:
            problems.add(number, f"not JSON that can be used: {error}")
        else:
            if isinstance(values, dict):
                rows.append(Row(values, str(path), number))
            else:
                kind = {list: "a list", str: "a string", type(None): "null"}.get(type(values), "a plain value")
                problems.add(number, f'{kind}, but every line must be an object {{"column": value, …}}')
    problems.stop()
    return rows


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value; write null or leave the column out")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text} is too large")
    return value


def _read_csv(path: Path, limits: Limits) -> list[Row]:
    problems = _Problems(path, limits.errors)
    # The field limit is the csv module's own global; lines are limited already.
    before = csv.field_size_limit(max(limits.line_bytes, 131_072))
    try:
        return _csv_rows(path, limits, problems)
    finally:
        csv.field_size_limit(before)


def _csv_rows(path: Path, limits: Limits, problems: _Problems) -> list[Row]:
    last = 0

    def lines() -> Iterator[str]:
        nonlocal last
        for number, line in _lines(path, limits, problems):
            last = number
            yield line

    reader = csv.reader(lines(), strict=True)
    header: list[str] = []
    rows = []
    while True:
        line = last + 1
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            problems.add(line, f"not CSV: {error}")
            break  # After a wrong quote the rest of the file cannot be told apart.
        if not fields:
            continue
        if not header:
            header = [name.strip() for name in fields]
            twice = sorted({name for name in header if header.count(name) > 1 or not name})
            if twice:
                problems.add(line, f"the header needs a name of its own for every column; check {twice}")
                break
        elif len(fields) != len(header):
            way = "quote a comma in a text" if len(fields) > len(header) else f"it needs {', '.join(header)}"
            count = f"{len(fields)} field{'s' * (len(fields) != 1)}"
            problems.add(line, f"{count}, but the header has {len(header)}; {way}")
        else:
            rows.append(Row(dict(zip(header, fields, strict=True)), str(path), line))
    problems.stop()
    return rows


def _read_parquet(path: Path, limits: Limits) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        facts = pyarrow.parquet.read_metadata(path)
        if sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups)) > limits.file_bytes:
            raise too_large(path, limits)
        table = pyarrow.parquet.read_table(path, partitioning=None)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({_brief(error)}). Write it again.") from error
    return [Row(values, str(path), i) for i, values in enumerate(table.to_pylist(), 1)]


def _read_folder(
    path: Path, split: str | None, config: str | None, prefer: Sequence[str], cache_dir: str | Path | None
) -> Rows:
    import datasets

    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(str(path))
        else:
            data = _load_dataset(str(path), config, cache_dir)
    except Exception as error:  # the library raises many kinds, of which few have a common base
        _name_malformed(path)
        inner = error.__cause__ or error
        raise DataError(
            f"{path}: neither a folder written by save_to_disk nor a folder of data files that can be read "
            f"({type(inner).__name__}: {_brief(inner)}). Give one of its files instead."
        ) from error
    return _dataset_rows(data, str(path), split, prefer)


def _name_malformed(folder: Path) -> None:
    """Raise for the first text file of a folder that cannot be read: the library does not tell file and line."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name.lower().endswith(TEXT_SUFFIXES):
            _read_file(file, Limits())


def _read_hub(
    name: str, split: str | None, config: str | None, prefer: Sequence[str], cache_dir: str | Path | None
) -> Rows:
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    way_out = "Download it where there is a network and give its path, or name the folder it lies in with --data."
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        # load_dataset retries for 23 seconds before it says that there is no network; this asks once.
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except GatedRepoError as error:
        raise DataError(
            f"{name}: on the hub, but gated. Ask for access on its page, then `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{name}: neither a local path nor a data set on the hub (or a private one: `hf auth login`). "
            f"Check the spelling."
        ) from error
    except Exception:  # no network, or an answer that makes no sense: what was downloaded before may still be there
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        data = _load_dataset(name, config, cache_dir)
    except Exception as error:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise DataError(
                f"{name}: not a local path, not downloaded before, and the hub cannot be reached. {way_out}"
            ) from error
        raise DataError(f"{name}: found on the hub, but it does not load ({_brief(error)}). {way_out}") from error
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = offline
    label = f"{name}:{config}" if config else name
    assert isinstance(data, datasets.Dataset | datasets.DatasetDict)
    return _dataset_rows(data, label, split, prefer)


def _load_dataset(name: str, config: str | None, cache_dir: str | Path | None) -> Any:
    import datasets

    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, cache_dir=None if cache_dir is None else str(cache_dir))
    finally:
        if not shown:
            datasets.enable_progress_bars()


def _dataset_rows(data: Any, label: str, split: str | None, prefer: Sequence[str]) -> Rows:
    import datasets

    if isinstance(data, datasets.DatasetDict):
        if split is None:
            split = next(iter(data)) if len(data) == 1 else next((name for name in prefer if name in data), None)
        if split not in data:
            known = ", ".join(map(str, data))
            raise DataError(f"{label}: no split {split!r}. Name one with `split`: it has {known}.")
        data, label = data[split], f"{label}[{split}]"
    elif split is not None and split != str(data.split):
        raise DataError(f"{label}: split={split!r} was given, but it is one data set without splits. Leave it out.")
    if not len(data):
        raise DataError(f"{label}: holds no rows. Give a data set with at least one.")
    return Rows([Row(v, label, i) for i, v in enumerate(data.to_list(), 1)], {label: data._fingerprint})


def _brief(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
