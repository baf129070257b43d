"""The table of results: what stands in it, and that it fits a narrow terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perdure.errors import NewerFormatError, RunError, StorageError
from perdure.recipes import show
from perdure.training.display import Terminal

SCORES = {"average": 0.5, "learning": 0.9, "forgetting": 0.4, "backward_transfer": -0.4, "higher_is_better": True}


LOSSES = {
    "average": 1.0,
    "learning": 12.5,
    "forgetting": 0.0001,
    "backward_transfer": 0.0,
    "higher_is_better": False,
}


def write(path: Path, right: float = 0.5, **changes: Any) -> Path:
    """A finished run's folder; `right` is each task's exact match at the end."""
    names = ("comparison", "a [b]task[/b]")
    summary = {**SCORES, "per_task": {name: {"final": right} for name in names}}
    result = {
        "format": 1, "main_metric": "exact_match", "tasks": list(summary["per_task"]),
        "steps": 1500, "seconds": 41.26,
        "metrics": {"exact_match": summary},
        "scores": {"exact_match": {"values": [[0.0, None], [right, right]]}},
        "probe": {"exact_match": [0.6, None, 0.55], "loss": [1.0, 2.0, 1.5]},
        "replay": None, **changes,
    }  # fmt: skip
    path.mkdir()
    (path / "results.json").write_text(json.dumps(result))
    return path


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "80")

    def run(*paths: Path) -> dict[str, list[str]]:
        """The rows by their labels; of two tables the second follows, each under its own title."""
        show.print_results(paths, Terminal())
        printed = capsys.readouterr().out
        run.printed = printed
        lines = printed[: printed.index("run:    ")].splitlines()
        assert max(map(len, lines)) <= 80
        rows = [line.strip() for line in lines]
        width = len(paths)
        found = {}
        for row in filter(None, rows):
            cells = row.replace(" %", "%").replace(" pt", "pt").rsplit(maxsplit=width)
            found[cells[0]] = cells[1:]
        return found

    return run


def test_a_column_for_each_run_and_a_row_for_each_metric(shown: Any, tmp_path: Path) -> None:
    replay = {"rows": 1, "row_share": 0.25, "targets": 2, "target_share": 0.2}
    paths = [write(tmp_path / "naive"), write(tmp_path / "replay", replay=replay)]
    joint = {**SCORES, "forgetting": None, "backward_transfer": None, "per_task": {"comparison": {"final": None}}}
    paths.append(write(tmp_path / "joint", metrics={"exact_match": joint}, probe={"exact_match": [0.6]}))
    rows = shown(*paths)
    assert "exact match of each task at the end (higher is better)" in shown.printed
    assert rows["comparison"] == ["50.0%", "50.0%", "–"]
    assert rows["a [b]task[/b]"] == ["50.0%", "50.0%", "–"]
    assert rows["average ↑"] == ["50.0%"] * 3
    assert rows["learning accuracy ↑"] == ["90.0%"] * 3
    assert rows["forgetting ↓"] == ["40.0pt", "40.0pt", "–"]
    assert rows["backward transfer ↑"] == ["−40.0pt", "−40.0pt", "–"]
    assert rows["general probe, before ↑"] == ["60.0%"] * 3
    assert rows["general probe, after ↑"] == ["55.0%", "55.0%", "–"]
    assert rows["replayed share of rows since task 2"] == ["–", "25.0%", "–"]
    assert rows["replayed share of target tokens since task 2"] == ["–", "20.0%", "–"]
    assert rows["steps"] == ["1,500"] * 3
    assert "steps skipped" not in rows
    assert rows["seconds of training"] == ["41.3"] * 3


def test_the_main_metric_is_shown_also_where_it_is_zero(shown: Any, tmp_path: Path) -> None:
    """Naive never had an answer right, replay had: both show exact match first. Alone, naive shows the loss too."""
    loss = {**LOSSES, "per_task": {"comparison": {"final": 10.0}, "a [b]task[/b]": {"final": 0.25}}}
    zero = {**SCORES, "average": 0.0, "learning": 0.0, "per_task": {"comparison": {"final": 0.0}}}
    metrics = {"exact_match": zero, "loss": loss}
    naive = write(tmp_path / "naive", 0.0, metrics=metrics)
    replay = write(tmp_path / "replay", metrics={"exact_match": SCORES | {"per_task": {}}, "loss": loss})
    assert shown(replay)["loss, average ↓"] == ["1.000"]
    assert shown.printed.count(" of each task at the end") == 1
    assert shown(naive, replay)["comparison"] == ["0.0%", "–"]
    assert shown.printed.count(" of each task at the end") == 1

    rows = shown(naive)
    first, second = shown.printed.split("loss of each task at the end (lower is better)")
    assert "exact match of each task at the end" in first
    assert "comparison" in first
    assert "general probe, before" in first
    assert not any(label.startswith("loss, ") for label in rows)
    assert "learning accuracy" not in second
    # Three decimals for every loss, and none says more than it can.
    assert (rows["comparison"], rows["a [b]task[/b]"]) == (["10.000"], ["0.250"])
    assert (rows["average ↓"], rows["when learnt ↓"], rows["forgetting ↓"]) == (["1.000"], ["12.500"], ["0.000"])


def test_runs_of_which_one_has_only_a_loss(shown: Any, tmp_path: Path) -> None:
    """Exact match where any run has it, whatever the order."""
    loss = {**LOSSES, "per_task": {}}
    text = write(
        tmp_path / "text", main_metric="loss", metrics={"loss": loss}, scores={"loss": {"values": [[1.0]]}}
    )
    rows = shown(text, write(tmp_path / "asked"))
    assert rows["comparison"] == ["–", "50.0%"]
    assert shown(text)["when learnt ↓"] == ["12.500"]


def test_no_task_has_held_out_rows(shown: Any, tmp_path: Path) -> None:
    rows = shown(write(tmp_path / "run", main_metric="loss", metrics={}, scores={}))
    assert rows["comparison"] == ["–"]


def test_rows_memory_and_skipped_steps(shown: Any, tmp_path: Path) -> None:
    data = {"comparison": {"evaluation": 1200}, "a [b]task[/b]": {"evaluation": 1}}
    other = {"comparison": {"evaluation": 1200}, "a [b]task[/b]": {"evaluation": 2}}
    one = write(tmp_path / "one", data=data, memory=2000, skipped=12)
    rows = shown(one, write(tmp_path / "two", data=other, memory=None, skipped=0))
    assert rows["comparison (1,200 rows)"] == ["50.0%", "50.0%"]
    assert "a [b]task[/b]" in rows  # they differ
    assert rows["memory, rows"] == ["2,000", "–"]
    assert rows["steps skipped"] == ["12", "–"]
    told = "one: 12 of 1,500 steps were skipped, since loss or gradient was not finite."
    assert told in shown.printed
    assert "two: " not in shown.printed
    assert "a [b]task[/b] (1 row)" in shown(one)


def test_the_figure_beside_a_page_about_several_runs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, picture = tmp_path / "compared.html", tmp_path / "comparison.png"

    def pages(paths: Any, out: Path) -> Path:
        picture.touch()
        return out

    monkeypatch.setattr(show, "write_pages", pages)
    runs = [write(tmp_path / name) for name in ("one", "two")]
    show.rebuild(runs, page)
    assert capsys.readouterr().out == f"report: {page}\nfigure: {picture}\n"
    show.rebuild(runs[:1], page)
    assert capsys.readouterr().out == f"report: {page}\n"
    show.print_results(runs, Terminal(), page)
    assert f"figure: {picture}" in capsys.readouterr().out.replace("\n", "")


def test_a_probe_of_plain_text_is_shown_by_its_loss(shown: Any, tmp_path: Path) -> None:
    rows = shown(write(tmp_path / "run", probe={"loss": [1.0, 2.5]}))
    assert rows["general probe, loss, before ↓"] == ["1.000"]
    assert rows["general probe, loss, after ↓"] == ["2.500"]
    assert not any("replayed" in row for row in rows)


def test_names_that_are_too_long_are_shortened(shown: Any, tmp_path: Path) -> None:
    shown(*(write(tmp_path / f"{i}-arena-tasks-replay+ewc-full-seed{i}") for i in range(4)))


def test_results_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no results\.json here; is the run finished"):
        show.read_results(tmp_path)
    with pytest.raises(NewerFormatError, match=r"format 2 is newer than this perdure reads \(1\); upgrade perdure"):
        show.read_results(write(tmp_path / "newer", format=2))
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        show.read_results(tmp_path)


def test_a_page_that_cannot_be_written_says_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, drawn: object) -> None:
        raise StorageError(f"could not write {path}/plots/a.png: No space left on device")

    monkeypatch.setattr("perdure.report.write_plots", full)
    with pytest.raises(StorageError, match=r"runs are intact; free .* with: perdure report x --out x/report\.html"):
        show.write_pages([Path("x")])


def test_a_run_that_is_told_tasks_has_two_columns(shown: Any, tmp_path: Path) -> None:
    """Told 50 % of each task, inferred 25 %; probe rows are of no task, and what it took is said once."""
    names = ("comparison", "a [b]task[/b]")
    untold = {**SCORES, "average": 0.25, "per_task": {name: {"final": 0.25} for name in names}}
    told = {**SCORES, "per_task": {name: {"final": 0.5} for name in names}}
    metrics = {"exact_match": told, "exact_match_inferred": untold}
    path = write(tmp_path / "packnet", metrics=metrics, task_identity="told")
    shown(path)
    lines = [" ".join(line.split()) for line in shown.printed.splitlines()]
    assert "packnet packnet" in lines
    assert "task told task inferred" in lines
    assert "comparison 50.0 % 25.0 %" in lines
    assert "average ↑ 50.0 % 25.0 %" in lines
    assert "general probe, after ↑ – 55.0 %" in lines
    assert "steps 1,500 –" in lines
    shown(write(tmp_path / "naive"), path)
    assert "comparison 50.0 % 50.0 % 25.0 %" in [" ".join(line.split()) for line in shown.printed.splitlines()]
    other = write(tmp_path / "other", task_identity="told")
    shown(other)
    assert "task told" in shown.printed
    assert "inferred" not in shown.printed
