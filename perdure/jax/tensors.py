"""The safetensors format, read and written piece by piece, so that no file need fit into memory.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name → dtype, shape, begin and end
within the data, and `__metadata__`), then the data, without gaps. The format's own library writes a file from a
dict that holds all of it; for one tensor at a time there is this.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from perdure.errors import ModelError

METADATA = "__metadata__"
PIECE = 16 << 20  # bytes read at a time
HEADER_LIMIT = 100 << 20  # the format's own
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: its dtype as the format names it, its shape, and the first of its bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return SIZES[self.dtype] * prod(self.shape)

    def part(self, index: int) -> Stored:
        """The `index`-th along its first dimension."""
        inner = Stored(self.file, self.dtype, self.shape[1:], 0)
        return Stored(self.file, self.dtype, self.shape[1:], self.start + index * inner.size)

    def pieces(self, at_most: int = PIECE) -> Iterator[bytes]:
        """Its bytes in order, `at_most` so many at a time."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.size
            while left:
                piece = file.read(min(left, at_most))
                if not piece:
                    raise ModelError(f"{self.file}: ends before its tensors do; copy it again")
                left -= len(piece)
                yield piece


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the data of a file.

    Attributes:
        text: the header as it stands in the file, padding included.
        tensors: by name, in the order of their data.
        metadata: what the file says of itself.
    """

    text: str
    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a file.

    Raises:
        ModelError: not a whole safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                raise ValueError("its first 8 bytes are no length of a header")
            text = file.read(length).decode("utf-8")
        return parse_header(path, text, size)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: there is no such file") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a whole safetensors file: {error}") from error


def parse_header(path: Path, text: str, size: int | None = None) -> Header:
    """A header from its text; with the file's `size` its end is checked too."""
    values = json.loads(text)
    metadata = values.pop(METADATA, None) or {}
    data = 8 + len(text.encode("utf-8"))
    tensors, end = {}, 0
    for name, entry in sorted(values.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        start, stop = entry["data_offsets"]
        if entry["dtype"] not in SIZES:
            raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
        stored = Stored(path, entry["dtype"], tuple(entry["shape"]), data + start)
        if start != end or stop - start != stored.size:
            raise ValueError(f"the bytes of {name} are not where its shape wants them")
        tensors[name], end = stored, stop
    if size is not None and data + end != size:
        raise ValueError(f"{size:,} bytes, and its tensors need {data + end:,}")
    return Header(text, tensors, metadata)


def header_text(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> str:
    """The header of a new file with these tensors (name, dtype, shape), in their order."""
    values: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + SIZES[dtype] * prod(shape)
        values[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode("utf-8")) % 8)  # the data begins at a multiple of 8


def begin(file: IO[bytes], text: str) -> None:
    """Write what stands before the data."""
    encoded = text.encode("utf-8")
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
