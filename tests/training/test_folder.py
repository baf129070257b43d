"""Run folders: which checkpoint is the newest, and what happens when it cannot be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perdure.errors import RunError
from perdure.sealed import TENSORS
from perdure.training.folder import FINAL, REQUIRED, RunFolder, stage_name, step_name


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def fill(folder: RunFolder, *names: str) -> None:
    for name in names:
        folder.save(name, {**dict.fromkeys(REQUIRED, 0), "name": name, "t": torch.ones(2)})


def tear(path: Path) -> None:
    (path / TENSORS).write_bytes(b"torn")


def test_no_run_here(folder: RunFolder) -> None:
    assert not folder.exists
    assert folder.saved() == []
    assert folder.newest() == (None, [])
    with pytest.raises(RunError, match=r"no run here \(it has no config\.yaml\)"):
        folder.settings()


def test_the_newest_goes_by_step_then_stage_then_final(folder: RunFolder) -> None:
    names = [step_name(3), stage_name(5, 1), step_name(9), stage_name(10, 2), FINAL]
    fill(folder, names[3], names[0], names[2], names[1])
    fill(folder, step_name(10))
    assert [path.name for path in folder.saved()] == [*names[:3], step_name(10), names[3]]
    fill(folder, FINAL)
    state, warnings = folder.newest()
    assert state is not None
    assert (state["name"], warnings) == (FINAL, [])


def test_a_torn_checkpoint_is_passed_over_in_words(folder: RunFolder) -> None:
    fill(folder, step_name(3), step_name(6), step_name(9))
    tear(folder.checkpoints / step_name(9))
    (folder.checkpoints / step_name(6) / "state.json").unlink()
    state, warnings = folder.newest()
    assert state is not None
    assert state["name"] == step_name(3)
    assert len(warnings) == 2
    assert step_name(9) in warnings[0]
    assert "going back to the one before it" in warnings[0]


def test_a_checkpoint_that_was_not_finished_is_no_checkpoint(folder: RunFolder) -> None:
    fill(folder, step_name(3))
    (folder.checkpoints / f".{step_name(6)}.partial").mkdir()
    assert [path.name for path in folder.saved()] == [step_name(3)]


def test_final_is_the_last_stage_renamed_and_back(folder: RunFolder) -> None:
    fill(folder, stage_name(5, 1), step_name(7), stage_name(10, 2))
    folder.drop_steps(0)
    folder.close(10, 2)
    folder.close(10, 2)
    assert [path.name for path in folder.saved()] == [stage_name(5, 1), FINAL]
    folder.reopen(10, 2)
    folder.reopen(10, 2)
    assert [path.name for path in folder.saved()] == [stage_name(5, 1), stage_name(10, 2)]


def test_the_newest_mid_task_checkpoints_are_kept_and_every_boundary(folder: RunFolder) -> None:
    fill(folder, step_name(2), step_name(4), stage_name(5, 1), step_name(7), step_name(9))
    folder.drop_steps(2)
    assert [path.name for path in folder.saved()] == [stage_name(5, 1), step_name(7), step_name(9)]
    folder.drop_steps(2)
    assert len(folder.saved()) == 3


@pytest.mark.parametrize("keep", [1, 2, 3, 8])
def test_as_many_mid_task_checkpoints_are_kept_as_asked(folder: RunFolder, keep: int) -> None:
    for step in range(1, 7):
        fill(folder, step_name(step))
        folder.drop_steps(keep)
        assert len(folder.saved()) == min(step, keep)


def test_a_foreign_checkpoint_is_passed_over(folder: RunFolder) -> None:
    fill(folder, step_name(3))
    folder.save(step_name(6), {"model": torch.ones(2)})
    state, warnings = folder.newest()
    assert state is not None
    assert state["name"] == step_name(3)
    assert "not a checkpoint of a run: it has no 'begun'" in warnings[0]


def test_a_stray_checkpoint_does_not_become_the_final_one(folder: RunFolder) -> None:
    fill(folder, stage_name(10, 2))
    (folder.checkpoints / step_name(99)).mkdir()
    folder.close(10, 2)
    assert [path.name for path in folder.saved()] == [step_name(99), FINAL]


def test_what_a_killed_process_left_is_swept_up(folder: RunFolder) -> None:
    """A replacement that stopped between its two renames is undone; all else that is half written goes."""
    fill(folder, step_name(3), step_name(6))
    (folder.checkpoints / step_name(6)).rename(folder.checkpoints / f".{step_name(6)}.old")
    for name in (f".{step_name(3)}.old", f".{step_name(9)}.partial", ".final.unreadable"):
        (folder.checkpoints / name).mkdir()
    (folder.path / ".scores.csv.partial").write_text("half")
    folder.sweep()
    names = {path.name for path in folder.checkpoints.iterdir()}
    assert names == {step_name(3), step_name(6), ".final.unreadable"}
    assert {path.name for path in folder.path.iterdir()} == {"checkpoints"}
    assert folder.newest()[1] == []
    folder.sweep(unreadable=True)
    assert {path.name for path in folder.checkpoints.iterdir()} == {step_name(3), step_name(6)}


HOLD = """
import sys, time
from pathlib import Path
from perdure.training.folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    (Path(sys.argv[1]) / "kept").touch()
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_cannot_share_a_folder_and_a_killed_one_never_blocks(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=rf"process {holder.pid} is at work here; wait for it"), folder.locked():
            pass
        holder.kill()
    with folder.locked():
        pass


def test_a_folder_that_nothing_was_written_to_is_gone_after_the_lock(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        assert folder.path.is_dir()
    assert not folder.path.exists()
    with folder.locked():
        folder.config.touch()
    assert folder.config.exists()
