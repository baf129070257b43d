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


def write(path: Path, **changes: Any) -> Path:
    summary = {**SCORES, "per_task": {name: {"final": 0.5} for name in ("comparison", "a [b]task[/b]")}}
    result = {
        "format": 1, "main_metric": "exact_match", "tasks": list(summary["per_task"]),
        "steps": 1500, "seconds": 41.26,
        "metrics": {"exact_match": summary}, "probe": {"exact_match": [0.6, None, 0.55], "loss": [1.0, 2.0, 1.5]},
        "replay": None, **changes,
    }  # fmt: skip
    path.mkdir()
    (path / "results.json").write_text(json.dumps(result))
    return path


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "80")

    def run(*paths: Path) -> dict[str, list[str]]:
        show.print_results(paths, Terminal())
        printed = capsys.readouterr().out
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
    assert rows["comparison"] == ["50.0%", "50.0%", "–"]
    assert rows["a [b]task[/b]"] == ["50.0%", "50.0%", "–"]
    assert rows["average ↑"] == ["50.0%"] * 3
    assert rows["learning accuracy ↑"] == ["90.0%"] * 3
    assert rows["forgetting ↓"] == ["40.0pt", "40.0pt", "–"]
    assert rows["backward transfer ↑"] == ["−40.0pt", "−40.0pt", "–"]
    assert rows["general probe, before ↑"] == ["60.0%"] * 3
    assert rows["general probe, after ↑"] == ["55.0%", "55.0%", "–"]
    assert rows["replayed share of rows"] == ["–", "25.0%", "–"]
    assert rows["replayed share of target tokens"] == ["–", "20.0%", "–"]
    assert rows["steps"] == ["1500"] * 3
    assert rows["seconds of training"] == ["41.3"] * 3


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
    def full(path: Path) -> None:
        raise StorageError(f"could not write {path}/plots/a.png: No space left on device")

    monkeypatch.setattr("perdure.report.write_plots", full)
    with pytest.raises(StorageError, match=r"runs are intact; free .* with: perdure report x --out x/report\.html"):
        show.write_pages([Path("x")])
