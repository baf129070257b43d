"""Hidden states of a frozen backbone: worked out once for each row of tokens, and kept on disk."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perdure.errors import ModelError, StorageError
from perdure.models.objectives import PAD
from perdure.storage import replaced_file

FORMAT = 2
PART_SECONDS = 60.0  # of work that an interruption may lose
MOST_WORKERS = 16  # beyond, Python itself is what they wait for
AHEAD = 64  # rows that are handed to them
Forward = Callable[[Tensor], Tensor]


def cache_folder() -> Path:
    """Where hidden states are kept: $PERDURE_CACHE, or ~/.cache/perdure."""
    return Path(os.environ.get("PERDURE_CACHE") or Path.home() / ".cache" / "perdure") / "hidden"


class HiddenStates:
    """The hidden states of token rows under one frozen backbone, in memory as float16 and in files of that.

    A file's folder is named by a hash of the backbone, and each file by a hash of the rows in it, so that what
    another model gave is never taken, and runs that share rows share files.

    Args:
        base: what the backbone is: hashes of its files.
        folder: of all caches; None: `cache_folder()`.

    Attributes:
        unwritten: why the newest file could not be written, in words; None where nothing was refused.
    """

    def __init__(self, base: Mapping[str, str], folder: Path | None = None) -> None:
        name = sha256(json.dumps([FORMAT, dict(sorted(base.items()))]).encode()).hexdigest()[:24]
        self.folder = (folder or cache_folder()) / name
        self._rows: dict[bytes, Tensor] = {}  # each [T, D], views into a file's tensor
        self._read: set[str] = set()
        self.unwritten: str | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def fill(
        self,
        rows: Iterable[Tensor],
        forward: Forward,
        tell: Callable[[int, int], None] = lambda done, of: None,
        side_by_side: bool = True,
    ) -> int:
        """Have the hidden states of all these rows, from memory, from disk, or worked out now and written.

        Args:
            rows: token rows, int64 [T] each.
            forward: ids [B, T], padded on the right with `PAD`, to hidden states [B, T, D].
            tell: called with (rows done, of how many) while they are worked out.
            side_by_side: whether as many rows are under way as there are threads, as a processor's cores want it.

        Returns:
            How many had to be worked out.
        """
        # This settles more than the number, MKL's own choices too; the same whether rows are missing or not.
        torch.set_num_threads(torch.get_num_threads())
        wanted = {name_of(row): row for row in rows}
        if any(name not in self._rows for name in wanted):
            self._read_files()
        missing = sorted((name, row) for name, row in wanted.items() if name not in self._rows)
        if missing:
            self._work_out(missing, forward, tell, MOST_WORKERS if side_by_side else 1)
        return len(missing)

    def __call__(self, x: Tensor, forward: Forward) -> Tensor:
        """Hidden states [B, T, D], float32, of ids [B, T] padded with `PAD`; zeros where a row has ended.

        Rows that were never asked for are worked out, and kept in memory alone.
        """
        found = []
        for row in x.cpu():
            ids = row[row != PAD]
            name = name_of(ids)
            if name not in self._rows:
                self._rows[name] = forward(ids[None].to(x.device))[0].to("cpu", torch.float16)
            found.append(self._rows[name])
        states = torch.zeros(*x.shape, found[0].shape[-1], dtype=torch.float32)
        for place, held in zip(states, found, strict=True):
            place[: len(held)] = held
        return states.to(x.device)

    def _work_out(
        self,
        missing: Sequence[tuple[bytes, Tensor]],
        forward: Forward,
        tell: Callable[[int, int], None],
        workers: int = 1,
    ) -> None:
        """Have the states of these rows, and write them.

        One row at a time and on one thread: what a row's states are to the last bit must depend neither on which
        others were missing too nor on the number of cores. One row's products are too small to be shared anyway.
        """

        def work_out(row: Tensor) -> Tensor:
            states = forward(row[None])[0].to("cpu", torch.float16)
            if not states.isfinite().all():
                raise ModelError("the backbone's hidden states are too large for float16; use --tuning lora")
            return states

        tell(0, len(missing))
        part: list[tuple[bytes, Tensor]] = []
        began = time.monotonic()
        try:
            with _single_threads(workers) as pool:
                found = _ahead(pool, work_out, [row for _, row in missing])
                for done, ((name, row), states) in enumerate(zip(missing, found, strict=True), start=1):
                    self._rows[name] = states
                    part.append((name, row))
                    if time.monotonic() - began > PART_SECONDS:
                        self._write(part)
                        part, began = [], time.monotonic()
                    tell(done, len(missing))
        finally:
            if part:
                self._write(part)

    def _write(self, part: Sequence[tuple[bytes, Tensor]]) -> None:
        """Write a file of these rows; where it cannot be, say so in `unwritten`."""
        names = [name for name, _ in part]
        with torch.autocast("cpu", enabled=False):  # under which float16 is not put together
            tensors = {
                "ids": torch.cat([row for _, row in part]).to(torch.int32),
                "lengths": torch.tensor([len(row) for _, row in part], dtype=torch.int32),
                "hidden": torch.cat([self._rows[name] for name in names]),
            }
        file = self.folder / f"{sha256(b''.join(names)).hexdigest()[:24]}.safetensors"
        try:
            with replaced_file(file, f".{os.getpid()}") as aside:
                save_file(tensors, aside)
        except StorageError as error:
            # Nothing is lost but time: the next run works them out again.
            self.unwritten = f"hidden states were not kept: {error} (PERDURE_CACHE names another folder)"
        self._read.add(file.name)

    def _read_files(self) -> None:
        if not self.folder.is_dir():
            return
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name in self._read:
                continue
            try:
                with safe_open(file, framework="pt") as opened:
                    parts: dict[str, Any] = {name: opened.get_tensor(name) for name in ("ids", "lengths", "hidden")}
            except (SafetensorError, OSError):
                continue  # half written by a machine that went down: it is written again under the same name
            self._read.add(file.name)
            lengths = parts["lengths"].tolist()
            for ids, states in zip(parts["ids"].split(lengths), parts["hidden"].split(lengths), strict=True):
                self._rows.setdefault(name_of(ids), states)


def _ahead(
    pool: ThreadPoolExecutor, work_out: Callable[[Tensor], Tensor], rows: Sequence[Tensor]
) -> Iterator[Tensor]:
    """What is worked out of each row, in order; a few rows ahead, which is all that a stop loses."""
    waiting: deque[Future[Tensor]] = deque()
    for row in rows:
        if len(waiting) == AHEAD:
            yield waiting.popleft().result()
        waiting.append(pool.submit(work_out, row))
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def _single_threads(most: int) -> Iterator[ThreadPoolExecutor]:
    """As many workers as PyTorch has threads, up to `most`, each with one thread of PyTorch's own."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(threads, most), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # which a worker's setting changes for threads that are started later


def name_of(ids: Tensor) -> bytes:
    """A row's name: the bytes of its ids, int32."""
    return ids.to("cpu", torch.int32).numpy().tobytes()
