"""`perdure arena compare`: which runs it finds, what it writes and prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perdure.errors import NewerFormatError, RunError
from perdure.recipes.arena.compare import compare, find_runs
from perdure.report import canvas

from .arena_runs import EIGHT, results, write


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canvas, "DPI", 20)
    monkeypatch.setenv("COLUMNS", "80")


def test_runs_are_found_once_and_in_order(tmp_path: Path) -> None:
    """A run by its name, those in a folder sorted; other recipes and hidden folders are passed over."""
    for name in ("all/b", "all/a", "all/deep/c", "one", "all/b/inside", "all/.hidden"):
        write(tmp_path / name, results(), log=False)
    (tmp_path / "all" / "demo").mkdir()
    (tmp_path / "all" / "demo" / "results.json").write_text(json.dumps({"format": 1, "name": "naive"}))
    found = find_runs([tmp_path / "one", tmp_path / "all", tmp_path / "all" / "a"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["one", "all/a", "all/b", "all/deep/c"]


def test_what_is_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    for seed in (0, 1):
        write(runs / f"lora-{seed}", results(seed=seed, end=0.7 + 0.1 * seed), log=False)
    long = "a name that is so long that no terminal of eighty columns could hold it in one line of a table"
    write(runs / "long", results(name=long, kinds=EIGHT, seconds_per_episode=123.4), log=False)
    compare([runs], None)
    out = capsys.readouterr().out
    names = ("complete_comparison.png", "results_table.png", "RESULTS_SUMMARY.md")
    assert sorted(path.name for path in runs.iterdir() if path.is_file()) == sorted(names)
    assert out.split("\n")[-4:-1] == [
        f"{head} {runs / name}" for head, name in zip(("figure: ", "table:  ", "summary:"), names, strict=True)
    ]
    table = out[: out.index("figure:")]
    assert max(map(len, table.split("\n"))) <= 80
    assert "lora (n = 2)" in table
    assert "onelineofatable(n=1)" in "".join("".join(line[:16].split()) for line in table.split("\n"))
    assert (runs / names[0]).read_bytes().startswith(b"\x89PNG")
    assert "# Results in the arena" in (runs / names[2]).read_text("utf-8")


def test_where_the_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into --out, else into what the arguments have in common, else into the one that is named."""
    written: list[Path] = []
    monkeypatch.setattr(
        "perdure.recipes.arena.compare.write_bytes", lambda path, content: written.append(path.parent)
    )
    monkeypatch.setattr("perdure.recipes.arena.compare.write_text", lambda path, text: written.append(path.parent))
    monkeypatch.setattr("perdure.report.arena_comparison.comparison", lambda groups: b"")
    monkeypatch.setattr("perdure.report.arena_table.results_table", lambda groups: b"")
    for name in ("a", "b/c"):
        write(tmp_path / name, results(name=name), log=False)
    for runs, out, where in (
        (["a", "b/c"], None, tmp_path),
        (["b"], None, tmp_path / "b"),
        (["a"], None, tmp_path / "a"),
        (["a", "b"], tmp_path / "new", tmp_path / "new"),
    ):
        written.clear()
        compare([tmp_path / name for name in runs], out)
        assert set(written) == {where}


def test_an_unfinished_run_beside_others_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "good", results(), log=False)
    (write(tmp_path / "begun", results()) / "results.json").unlink()
    compare([tmp_path], None)
    assert f"warning: {tmp_path / 'begun'} is not finished and is left out" in capsys.readouterr().out
    assert (tmp_path / "complete_comparison.png").exists()


def test_what_is_refused(tmp_path: Path) -> None:
    """All that is wrong is said at once, each with its folder; all of it ends with exit code 2."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    write(tmp_path / "good", results(), log=False)
    begun = write(tmp_path / "begun", results())
    (begun / "results.json").unlink()
    write(tmp_path / "unfinished", results(finished=False), log=False)
    write(tmp_path / "newer", results(format=9), log=False)
    for names, kind, messages in (
        ([], RunError, ["no run was given"]),
        (["empty"], RunError, [f"{tmp_path / 'empty'}: no arena run here, nor in the folders below"]),
        (
            ["file", "gone", "good"],
            RunError,
            ["2 runs cannot be compared", "file is a file", "gone does not exist"],
        ),
        (
            ["begun", "unfinished"],
            RunError,
            ["begun is not finished", "unfinished/results.json: finished is not true"],
        ),
        (["good", "newer"], NewerFormatError, ["newer/results.json: format 9 is newer"]),
        (["begun", "newer"], NewerFormatError, ["2 runs cannot be compared", "begun is", "format 9 is newer"]),
    ):
        with pytest.raises(kind) as error:
            compare([tmp_path / name for name in names], None)
        assert error.value.exit_code == 2
        for message in messages:
            assert message in str(error.value)
    assert not (tmp_path / "complete_comparison.png").exists()
