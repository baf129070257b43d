"""Erasure: after it a run equals, byte for byte, the same settings on files without the rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from perdure.errors import RunError
from perdure.order import fingerprint
from perdure.streams.spec import TaskSpec
from perdure.training import erase as room
from perdure.training.erase import erase
from perdure.training.folder import FINAL, RunFolder
from perdure.training.interrupt import Interrupted
from perdure.training.plan import every_row, make_plan
from perdure.training.run import Run
from perdure.training.settings import RunSettings

FILES = ("a.jsonl", "a-test.jsonl", "b.jsonl", "b-test.jsonl", "c.jsonl", "c-test.jsonl", "probe-test.jsonl")


@pytest.fixture(scope="module")
def data(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with the tasks' rows, each with an id such as "a0" or "b-test1", without those in `gone`.

    One for each `gone`; a test that changes it takes a copy.
    """
    made: dict[frozenset[str], Path] = {}

    def make(gone: Iterable[str] = ()) -> Path:
        gone = frozenset(gone)
        if gone in made:
            return made[gone]
        folder = made[gone] = tmp_path_factory.mktemp("data")
        for file in FILES:
            lines = []
            for number, line in enumerate((tiny / file).read_text().splitlines()):
                row = {"id": f"{file.removesuffix('.jsonl')}{number}", **json.loads(line)}
                if row["id"] not in gone:
                    lines.append(json.dumps(row) + "\n")
            (folder / file).write_text("".join(lines))
        return folder

    return make


@pytest.fixture(scope="module")
def ran(data: Any, finished: Any) -> Callable[..., Path]:
    """Path of a run on the files without the rows in `gone`; one a setting, and what erases takes a copy."""

    def get(gone: Iterable[str] = (), **changes: Any) -> Path:
        return finished(**{"strategy": "naive", **changes}, data=str(data(gone)))

    return get


@pytest.fixture(scope="module")
def extended(
    ran: Any, data: Any, execute: Any, settings: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The same, of a run that went on with task c after it had ended."""
    done: dict[str, Path] = {}
    task = TaskSpec(name="c", train="c.jsonl", evaluation="c-test.jsonl")

    def get(gone: Iterable[str] = (), **changes: Any) -> Path:
        name = json.dumps([sorted(gone), changes])
        if name not in done:
            path = shutil.copytree(ran(gone, **changes), tmp_path_factory.mktemp("extended") / "run")
            asked = settings(**{"strategy": "naive", **changes}, data=str(data(gone)))
            execute(asked.model_copy(update={"extensions": (task,)}), path)
            done[name] = path
        return done[name]

    return get


def result(path: Path) -> dict[str, bytes]:
    """The bytes of what a run ends with."""
    places = (path / "checkpoints" / FINAL, path / "model", path / "adapter")
    files = [file for place in places for file in place.rglob("*") if file.is_file()] + list(
        path.glob("scores*.csv")
    )
    assert len(files) > 5
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def run_erase(path: Path, *keys: str, retrain: bool = False, run: Any = Run) -> Any:
    folder = RunFolder(path)
    return erase(folder, map(fingerprint, keys), make_plan, lambda plan: run(plan, folder), retrain)


@pytest.mark.parametrize(
    ("changes", "gone", "retrained", "rescored"),
    [
        ({"strategy": "naive"}, ["b2"], ("b",), ()),
        ({"strategy": "naive"}, ["a2"], ("a", "b"), ()),
        ({"strategy": "replay"}, ["b0", "b5"], ("b",), ()),
        ({"strategy": "replay+ewc"}, ["a1", "a4", "b3"], ("a", "b"), ()),
        ({"strategy": "replay", "continual_strategy": {"replay": {"capacity": "60%"}}}, ["b1"], ("a", "b"), ()),
        ({"strategy": "ewc", "tuning": "lora"}, ["b1"], ("b",), ()),
        ({"strategy": "replay", "tuning": "soft-prompt"}, ["b1"], ("b",), ()),
        ({"strategy": "replay"}, ["a-test1"], (), ("a",)),
        ({"strategy": "replay"}, ["probe-test0", "b-test2"], (), ("b", "general probe")),
        ({"strategy": "replay"}, ["b4", "a-test0"], ("b",), ("a",)),
        ({"strategy": "joint"}, ["a3", "b-test0"], ("joint",), ("b",)),
        ({"strategy": "isolated"}, ["b3", "a-test0"], ("b",), ("a",)),
        ({"strategy": "naive", "schedule": {"type": "linear", "at_boundary": "continue"}}, ["b3"], ("a", "b"), ()),
    ],
    ids=str,
)
def test_equals_the_run_on_files_without_the_rows(
    ran: Any, execute: Any, tmp_path: Path, changes: Any, gone: Any, retrained: Any, rescored: Any
) -> None:
    path, clean = shutil.copytree(ran(**changes), tmp_path / "run"), ran(gone, **changes)
    assert result(path) != result(clean)
    way = run_erase(path, *gone)
    assert (way.retrained, way.rescored) == (retrained, rescored)
    assert result(path) == result(clean)
    events = [json.loads(line) for line in (path / "erasures.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["begun", "done"]
    assert events[1]["keys"] == sorted(map(fingerprint, gone))
    assert events[1]["before"] != events[1]["after"]
    assert RunFolder(path).erasing is None
    for file in path.rglob("*"):
        if file.is_file():
            assert not any(f'"{key}"'.encode() in file.read_bytes() for key in gone), file

    # It stays gone: the run goes on, and nothing more changes.
    execute(RunFolder(path).settings(), path)
    assert result(path) == result(clean)
    assert run_erase(path, *gone) is None


@pytest.mark.parametrize("gone", [["c1"], ["a1"], ["b1", "c-test0"], ["a-test0", "c2"]], ids=str)
def test_an_extended_run_is_extended_again(extended: Any, tmp_path: Path, gone: list[str]) -> None:
    share = {"strategy": "replay", "continual_strategy": {"replay": {"capacity": "60%"}}}
    path, clean = shutil.copytree(extended(**share), tmp_path / "run"), extended(gone, **share)
    run_erase(path, *gone)
    assert result(path) == result(clean)
    assert [task.name for task in RunFolder(path).settings().extensions] == ["c"]


@pytest.mark.parametrize("place", ["_rewind", "_rescore", "execute", "write_log"])
def test_an_erasure_that_was_stopped_is_finished(
    ran: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    gone = ["b1", "a-test0"]
    path = shutil.copytree(ran(strategy="replay"), tmp_path / "run")
    with monkeypatch.context() as patch:
        calls = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if place == "write_log" and len(calls) == 1:
                return original(*args, **kwargs)
            if place in ("_rewind", "_rescore"):
                original(*args, **kwargs)
            raise KeyboardInterrupt

        owner: Any = Run if place == "execute" else room
        original = getattr(owner, place)
        patch.setattr(owner, place, stop)
        with pytest.raises(KeyboardInterrupt):
            run_erase(path, *gone)
    assert RunFolder(path).erasing is not None
    run_erase(path)
    assert RunFolder(path).erasing is None
    assert result(path) == result(ran(gone, strategy="replay"))


def test_without_an_early_enough_checkpoint_a_full_retrain_is_offered(ran: Any, tmp_path: Path) -> None:
    path = shutil.copytree(ran(), tmp_path / "run")
    (early,) = (path / "checkpoints").glob("stage-001-*")
    shutil.rmtree(early)
    before = result(path)
    with pytest.raises(RunError, match=r"from before task 'b' is gone or torn.*--retrain"):
        run_erase(path, "b1")
    assert result(path) == before
    way = run_erase(path, "b1", retrain=True)
    assert way.retrained == ("a", "b")
    assert result(path) == result(ran(["b1"]))


def test_a_key_that_no_row_has_changes_nothing(ran: Any, tmp_path: Path) -> None:
    path = shutil.copytree(ran(), tmp_path / "run")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert run_erase(path, "nobody") is None
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("step", [2, 8], ids=["in the first stage", "in the second"])
@pytest.mark.parametrize("kind", ["interrupt", "kill"])
def test_an_erasure_that_was_stopped_while_it_trained_is_finished(
    ran: Any, Stop: Any, tmp_path: Path, step: int, kind: str
) -> None:
    """From the start: no checkpoint between two stages is left while the first one is trained again."""

    def kill() -> None:
        raise KeyboardInterrupt

    changes = {"strategy": "replay", "checkpoint_every": 1}
    path = shutil.copytree(ran(**changes), tmp_path / "run")
    display = Stop(step=step, act=None if kind == "interrupt" else kill)
    with pytest.raises(BaseException) as stopped:
        run_erase(path, "a1", run=lambda plan, folder: Run(plan, folder, display))
    assert stopped.type in (Interrupted, KeyboardInterrupt)
    run_erase(path)
    assert RunFolder(path).erasing is None
    assert result(path) == result(ran(["a1"], **changes))


@pytest.mark.parametrize("step", [3, 9])
def test_an_erasure_of_an_extended_run_that_was_stopped_is_finished(
    extended: Any, Stop: Any, tmp_path: Path, step: int
) -> None:
    """Step 3 is in the second task, step 9 in the extension."""
    path = shutil.copytree(extended(), tmp_path / "run")
    display = Stop(step=step)
    with pytest.raises(Interrupted):
        run_erase(path, "b1", run=lambda plan, folder: Run(plan, folder, display))
    run_erase(path)
    assert result(path) == result(extended(["b1"]))


@pytest.mark.parametrize(
    "gone", [[f"b-test{i}" for i in range(3)], ["a-test0", "a-test1", "a-test2", "b3"]], ids=str
)
def test_a_task_without_held_out_rows_left_has_no_scores(
    ran: Any, settings: Any, data: Any, execute: Any, tmp_path: Path, gone: list[str]
) -> None:
    less = shutil.copytree(data(gone), tmp_path / "less")
    shutil.copytree(ran(), tmp_path / "run")
    run_erase(tmp_path / "run", *gone)
    # An empty file of held-out rows is refused: one row that is erased as well stands in for it.
    emptied = gone[0].split("-")[0]
    row = (data() / f"{emptied}-test.jsonl").read_text().splitlines()[0]
    (less / f"{emptied}-test.jsonl").write_text(row + "\n")
    key = fingerprint(json.loads(row)["id"])
    execute(settings(data=str(less)).model_copy(update={"erased": (key,)}), tmp_path / "clean")
    assert result(tmp_path / "run") == result(tmp_path / "clean")


def test_a_row_that_a_cap_left_out_does_not_come_in(settings: Any, data: Any, execute: Any, tmp_path: Path) -> None:
    """The first three of task b by key hash are trained on; erasing one lets the fourth in unless it goes too."""

    def asked(folder: Path) -> RunSettings:
        tasks = [
            {"name": "a", "train": "a.jsonl", "evaluation": "a-test.jsonl"},
            {"name": "b", "train": "b.jsonl", "evaluation": "b-test.jsonl", "train_rows": 3},
        ]
        return settings(data=str(folder), stream={"tasks": tasks})

    folder = data()
    execute(asked(folder), tmp_path / "run")
    kept = {row.key for row in make_plan(asked(folder)).stages[1].train}
    out = sorted({f"b{i}" for i in range(6)} - kept)
    assert {row.key for row in every_row(make_plan(asked(folder)), ())} >= {*kept, *out, "probe-test0"}
    way = run_erase(tmp_path / "run", out[0])
    assert (way.retrained, way.rescored) == ((), ())
    first = sorted(kept)[0]
    run_erase(tmp_path / "run", first)
    execute(asked(data([out[0], first])), tmp_path / "clean")
    assert result(tmp_path / "run") == result(tmp_path / "clean")


def test_what_was_left_lying_about_is_gone(ran: Any, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(ran(strategy="replay"), tmp_path / "run"))
    for name in (".step-00000003.partial", ".final.unreadable"):
        shutil.copytree(folder.checkpoints / FINAL, folder.checkpoints / name)
    (folder.path / "evaluation.json").write_text("{}")
    assert b'"a1"' in (folder.checkpoints / ".final.unreadable" / "state.json").read_bytes()
    run_erase(folder.path, "a1")
    assert [path.name for path in folder.checkpoints.iterdir() if path.name.startswith(".")] == []
    assert not (folder.path / "evaluation.json").exists()


def test_a_link_among_the_checkpoints_is_removed_and_not_what_it_leads_to(ran: Any, tmp_path: Path) -> None:
    path = shutil.copytree(ran(), tmp_path / "run")
    (early,) = (path / "checkpoints").glob("stage-001-*")
    early.rename(tmp_path / "elsewhere")
    early.symlink_to(tmp_path / "elsewhere")
    run_erase(path, "a1")
    assert (tmp_path / "elsewhere" / "state.json").is_file()
    assert not early.is_symlink()


@pytest.mark.parametrize("kept", ["state.json", "state.safetensors"])
def test_a_kill_while_the_final_checkpoint_was_removed_leaves_nothing(
    ran: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    """Half of it stays: the erasure is finished all the same, and that half is gone."""
    folder = RunFolder(shutil.copytree(ran(strategy="replay"), tmp_path / "run"))

    def half(run: RunFolder, way: Any) -> None:
        original(run, way)
        last = run.checkpoints / "stage-002-step-00000012"
        last.mkdir()
        (last / kept).write_bytes(b"half")
        raise KeyboardInterrupt

    original = room._rewind
    with monkeypatch.context() as patch:
        patch.setattr(room, "_rewind", half)
        with pytest.raises(KeyboardInterrupt):
            run_erase(folder.path, "a1")
    run_erase(folder.path)
    assert result(folder.path) == result(ran(["a1"], strategy="replay"))
    assert [path.name for path in folder.checkpoints.iterdir() if path.name.startswith(".")] == []
    events = [json.loads(line) for line in folder.erasures.read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["retrained"]) == ("done", ["a", "b"])


def test_a_copy_of_the_last_checkpoint_is_in_nobodys_way(ran: Any, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(ran(), tmp_path / "run"))
    shutil.copytree(folder.checkpoints / FINAL, folder.checkpoints / "stage-002-step-00000012")
    run_erase(folder.path, "a-test1")
    assert result(folder.path) == result(ran(["a-test1"]))
