"""The score matrix: growth, plain values, CSV, and streams whose stages are not its tasks."""

import csv
import json
import math
import os

import numpy as np
import pytest

from perdure.errors import ConfigError, StorageError
from perdure.evaluation import ScoreMatrix
from perdure.evaluation.matrix import json_safe


def plain() -> ScoreMatrix:
    R = ScoreMatrix("accuracy")
    for row, scores in enumerate([[0.0, 0.25], [0.75, 0.5], [0.5, 1.0]]):
        for task, score in zip(["a", "b"], scores, strict=True):
            R.record(row, task, score)
    return R


def joint() -> ScoreMatrix:
    R = ScoreMatrix("exact_match")
    row = R.record_stage("joint")
    for task, before, after in [("a", 0.0, 0.5), ("b", 0.25, 0.75), ("c", 0.5, 1.0)]:
        R.record(0, task, before)
        R.record(row, task, after)
    return R


def test_grows_to_one_row_more_than_tasks():
    R = ScoreMatrix("accuracy")
    assert R.values.shape == (1, 0)
    assert R.tasks == R.stages == []
    R.record(0, "a", 0.0)
    R.record(1, "a", 0.75)
    assert R.values.shape == (2, 1)
    R.record(0, "b", 0.25)
    np.testing.assert_array_equal(R.values, [[0.0, 0.25], [0.75, np.nan]])
    R.record(1, "b", 0.5)
    R.record(2, "a", 0.5)
    R.record(2, "b", 1.0)
    np.testing.assert_array_equal(R.values, plain().values)
    assert R.values.dtype == np.float64
    assert R.tasks == R.stages == ["a", "b"]


def test_values_are_a_copy_and_cells_can_be_measured_again():
    R = plain()
    R.values[:] = 7
    R.record(2, "a", 0.125)
    assert R.values[2].tolist() == [0.125, 1.0]


def test_a_negative_row_or_a_stage_before_training_is_refused():
    with pytest.raises(ConfigError, match="got -1"):
        ScoreMatrix("loss").record(-1, "a", 0.0)
    with pytest.raises(ConfigError, match="row 0 is before training"):
        ScoreMatrix("loss").record_stage("a", 0)


def test_summary_is_that_of_the_metrics():
    """Task a went 0.75 -> 0.5: 0.25 lost; task b had 0.5 before its training, 0.25 at the start."""
    values = plain().summary(counts=[1, 3])
    assert (values["average"], values["micro_average"], values["learning"]) == (0.75, 0.875, 0.875)
    assert (values["forgetting"], values["forward_transfer"]) == (0.25, 0.25)


def test_joint_is_one_stage_that_trains_all_tasks():
    """[2, 3]: average (0.5 + 0.75 + 1) / 3 = 0.75, also what was learnt; forgetting is not defined."""
    R = joint()
    assert R.values.shape == (2, 3)
    assert R.stages == ["joint"]
    values = R.summary()
    assert values["average"] == values["learning"] == 0.75
    assert math.isnan(values["forgetting"])
    assert math.isnan(values["backward_transfer"])
    assert values["pairwise_transfer"] is None  # no task was trained by itself
    assert values["per_task"]["b"] == {"before": 0.25, "learnt": 0.75, "final": 0.75, "best": 0.75}


def test_joint_over_one_task_is_not_taken_for_a_plain_stream():
    R = ScoreMatrix("loss", higher_is_better=False)
    R.record(0, "a", 2.0)
    R.record(R.record_stage("joint"), "a", 1.0)
    assert R.summary()["learning"] == 1.0


def test_a_run_cut_short_reports_what_it_has():
    """Three tasks known, one trained: learning is that task's 0.5, the average is over the last row."""
    R = ScoreMatrix("exact_match")
    for row, scores in enumerate([[0.0, 0.0, 0.25], [0.5, 0.25, 0.0]]):
        for task, score in zip("abc", scores, strict=True):
            R.record(row, task, score)
    values = R.summary()
    assert (values["average"], values["learning"]) == (0.25, 0.5)
    assert math.isnan(values["forgetting"])
    assert math.isnan(values["per_task"]["c"]["learnt"])


def test_one_stage_of_a_named_task_learns_only_that_task():
    R = ScoreMatrix("exact_match")
    R.record_stage("b")
    for row, scores in enumerate([[0.0, 0.0], [0.25, 1.0]]):
        for task, score in zip("ab", scores, strict=True):
            R.record(row, task, score)
    assert R.summary()["learning"] == 1.0
    assert math.isnan(R.summary()["per_task"]["a"]["learnt"])


def test_an_empty_matrix_has_a_summary():
    values = ScoreMatrix("loss").summary()
    assert math.isnan(values["average"])
    assert values["per_task"] == {}


@pytest.mark.parametrize("make", [plain, joint, lambda: ScoreMatrix("loss", False)])
def test_plain_values_and_back(make):
    R = make()
    R.record(3, "z", math.inf)
    text = json.dumps(R.to_dict(), allow_nan=False)
    again = ScoreMatrix.from_dict(json.loads(text))
    np.testing.assert_array_equal(again.values, R.values)
    assert again.to_dict() == R.to_dict()
    assert (again.metric, again.higher_is_better, again.tasks) == (R.metric, R.higher_is_better, R.tasks)


def test_a_task_never_measured_keeps_its_column():
    R = ScoreMatrix("loss", False)
    R.record(0, "a", math.nan)
    assert R.to_dict()["values"] == [[None]]
    assert ScoreMatrix.from_dict(R.to_dict()).tasks == ["a"]


@pytest.mark.parametrize(
    "state", [{}, {"metric": "loss", "higher_is_better": False, "tasks": ["a"], "stages": ["a"], "values": [[1]]}]
)
def test_other_values_are_refused(state):
    with pytest.raises(ConfigError, match="not a score matrix"):
        ScoreMatrix.from_dict(state)


def test_csv_has_all_digits_and_equal_bytes(tmp_path):
    R = ScoreMatrix("loss", False)
    R.record(0, 'one, "two"', 0.1 + 0.2)
    R.record(1, 'one, "two"', 1e-17)
    R.record(1, "b", 3)
    R.to_csv(tmp_path / "scores.csv")
    assert (tmp_path / "scores.csv").read_bytes() == (
        b'after,"one, ""two""",b\nstart,0.30000000000000004,\n"one, ""two""",1e-17,3.0\n'
    )
    ScoreMatrix.from_dict(R.to_dict()).to_csv(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "scores.csv").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.csv", "scores.csv"]


def test_csv_of_joint_has_one_line_after_the_start(tmp_path):
    joint().to_csv(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open() as file:
        assert [row[0] for row in csv.reader(file)] == ["after", "start", "joint"]


def test_a_failed_write_keeps_the_old_file_and_says_which(tmp_path, monkeypatch):
    path = tmp_path / "scores.csv"
    plain().to_csv(path)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"could not write .*scores\.csv: No space left"):
        joint().to_csv(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["scores.csv"]


def test_json_safe():
    value = {"a": [1.5, math.nan, (2, -math.inf)], "b": "nan", "c": None, "d": np.float64("nan")}
    assert json_safe(value) == {"a": [1.5, None, [2, "-inf"]], "b": "nan", "c": None, "d": None}
