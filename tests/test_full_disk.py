"""A disk that fills up or turns read-only: what is said, what stays readable, and that the run goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from perdure import sealed
from perdure.tracking import read_events
from perdure.training import checkpoint
from perdure.training.folder import RunFolder
from perdure.training.plan import Plan


class Disk:
    """A place to write that can be filled up."""

    def __init__(self, path: Path, fill: Callable[[], None], free: Callable[[], None]) -> None:
        self.path, self.fill, self.free = path, fill, free


@pytest.fixture(params=["a small tmpfs", "a refusing fsync"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    if request.param == "a refusing fsync":

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        true = os.fsync
        yield Disk(
            tmp_path, lambda: monkeypatch.setattr(os, "fsync", full), lambda: monkeypatch.setattr(os, "fsync", true)
        )
        return
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root may mount")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    filler = place / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"0" * 4096)

    try:
        yield Disk(place, fill, filler.unlink)
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("moment", ["second checkpoint", "export"])
def test_a_full_disk(
    perdure: Callable[..., Any],
    recipe: Path,
    finished_run: Path,
    disk: Disk,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk is full from just before the second task's checkpoint, or the model's export; then it is freed."""
    from perdure.training import telling

    true_save, true_export = RunFolder.save, telling.export

    def save(self: RunFolder, name: str, state: dict[str, Any]) -> Path:
        if name.startswith("stage-002") and moment == "second checkpoint":
            disk.fill()
        return true_save(self, name, state)

    def export(plan: Plan, folder: RunFolder) -> None:
        if moment == "export":
            disk.fill()
        true_export(plan, folder)

    out = disk.path / "run"
    with monkeypatch.context() as during:
        during.setattr(RunFolder, "save", save)
        during.setattr("perdure.training.run.export", export)
        done = perdure("run", recipe, "--out", out)
    assert done.code == 1
    assert "the disk is full; free some space" in done.err
    assert f"Then go on with: perdure run {recipe} --out {out} --resume" in done.err
    assert "Traceback" not in done.err
    kept = RunFolder(out).saved()
    assert [path.name[:9] for path in kept] == ["stage-001", "stage-002"][: 1 + (moment == "export")]
    assert all(checkpoint.load(path)["stage"] == i for i, path in enumerate(kept, 1))
    lines = (out / "metrics.jsonl").read_bytes().splitlines()
    assert len(read_events(out / "metrics.jsonl")) == len(lines)

    disk.free()
    resumed = perdure("run", recipe, "--out", out, "--resume")
    assert (resumed.code, resumed.err) == (0, "")
    here, there = (json.loads((run / "results.json").read_text()) for run in (out, finished_run))
    assert here["scores"] == there["scores"]


@pytest.mark.parametrize("moment", ["before the run", "second checkpoint"])
def test_a_read_only_folder(
    perdure: Callable[..., Any],
    recipe: Path,
    finished_run: Path,
    tmp_path: Path,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file system that is mounted read-only: before anything is written, or while the run is at work."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root may mount")
    if subprocess.run([mount, "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    out, true_save = place / "run", RunFolder.save

    def save(self: RunFolder, name: str, state: dict[str, Any]) -> Path:
        if name.startswith("stage-002"):
            # The kernel refuses to remount while the log is open for writing.
            monkeypatch.setattr(sealed, "folder", _refused(sealed.folder))
        return true_save(self, name, state)

    try:
        if moment == "before the run":
            subprocess.run([mount, "-o", "remount,ro", place], check=True)
            done = perdure("run", recipe, "--out", out)
        else:
            monkeypatch.setattr(RunFolder, "save", save)
            done = perdure("run", recipe, "--out", out)
            monkeypatch.undo()
        assert done.code == 1
        assert "the folder cannot be written to; give another one with --out" in done.err
        assert "Traceback" not in done.err
        if moment == "second checkpoint":
            assert [path.name[:9] for path in RunFolder(out).saved()] == ["stage-001"]
            subprocess.run([mount, "-o", "remount,ro", place], check=True)
            assert RunFolder(out).newest()[1] == []
        subprocess.run([mount, "-o", "remount,rw", place], check=True)
        assert perdure("run", recipe, "--out", out, "--resume").code == 0
        here, there = (json.loads((run / "results.json").read_text()) for run in (out, finished_run))
        assert here["scores"] == there["scores"]
    finally:
        subprocess.run(["umount", place], check=True)


def _refused(true: Any) -> Any:
    @contextmanager
    def folder(path: Path) -> Iterator[Path]:
        with true(path) as aside:
            yield aside
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    return folder
