"""Reading run folders: finished, unfinished, damaged, and what is none."""

import json
import math

import pytest

from perdure.errors import RunError
from perdure.report import read_run, read_runs
from perdure.report.read import Scores


def test_a_finished_run(make_run):
    """Task a: 0.1 before, 0.9 learnt, 0.9 - 2 * 0.3 = 0.3 in the end; seen means 0.9, (0.6 + 0.9) / 2, 1.8 / 3."""
    run = read_run(make_run())
    scores = run.scores["exact_match"]
    assert (run.name, run.strategy, run.finished, run.tasks) == ("naive", "naive", True, ("a", "b", "c"))
    assert (scores.before(0), scores.learnt(0), scores.final(0)) == pytest.approx((0.1, 0.9, 0.3))
    assert scores.mean_seen() == pytest.approx([0.9, 0.75, 0.6])
    assert run.boundaries() == [("a", 10), ("b", 20), ("c", 30)]
    assert run.summaries["exact_match"]["forgetting"] == pytest.approx((0.6 + 0.3) / 2)
    assert list(run.scores) == ["exact_match", "loss"]


def test_an_unfinished_run_has_what_its_events_hold(make_run):
    whole, part = read_run(make_run()), read_run(make_run("part", results=False))
    assert not part.finished
    assert part.scores == whole.scores
    assert part.summaries["exact_match"] == pytest.approx(
        {"average": 0.6, "learning": 0.9, "higher_is_better": True}
    )
    assert part.summaries["loss"]["higher_is_better"] is False
    assert part.probe["exact_match"] == pytest.approx([0.5, 0.25, 0.5 / 3, 0.125])


def test_what_can_be_forgotten_was_measured_when_it_was_learnt():
    """F1 of the last task alone has nothing that came after it; of the first alone it has."""
    tasks = ("math", "hotpot")
    late = Scores("f1", True, tasks, tasks, ((math.nan, 0.1), (math.nan, 0.3), (math.nan, 0.8)))
    early = Scores("f1", True, tasks, tasks, ((0.1, math.nan), (0.8, math.nan), (0.3, math.nan)))
    lone = Scores("f1", True, tasks[1:], tasks, ((0.1,), (0.3,), (0.8,)))  # as an unfinished run's log has it
    assert [table.outlasted() for table in (late, early, lone)] == [False, True, False]
    assert (early.changed(0), lone.learnt(0)) == (pytest.approx(-0.5), 0.8)
    assert math.isnan(late.changed(1))


def test_joint_without_results_is_one_stage(make_run):
    run = read_run(make_run("joint", joint=True, results=False))
    assert run.scores["loss"].stages == ("joint",)
    assert run.scores["exact_match"].learnt(1) == 0.9
    assert run.boundaries() == [("joint", 10)]


def test_isolated_runs_have_one_row_and_a_boundary_a_task(make_run):
    """Each task is trained from the start and scored in row 1, yet the steps say which task they trained."""
    path = make_run()
    results = json.loads((path / "results.json").read_text())
    for scores in results["scores"].values():
        scores.update(stages=["isolated"], values=scores["values"][:2])
    (path / "results.json").write_text(json.dumps(results))
    run = read_run(path)
    assert [run.scores["loss"].trained(i) for i in range(3)] == [1, 1, 1]
    assert run.boundaries() == [("a", 10), ("b", 20), ("c", 30)]


def test_cells_not_measured_are_nan(make_run):
    run = read_run(make_run(sparse=True))
    assert math.isnan(run.scores["loss"].before(2))


def test_the_main_metric_comes_first(make_run):
    """As results.json states it; without results, exact match where it was measured."""
    assert list(read_run(make_run(main_metric="loss")).scores) == ["loss", "exact_match"]
    assert list(read_run(make_run("part", results=False)).scores) == ["exact_match", "loss"]


def test_what_came_after_a_task_was_learnt(make_run):
    """Only a stream with a stage after a task's own has something to forget."""
    paths = [make_run(), make_run("joint", joint=True), make_run("one", ("a",))]
    assert [run.scores["loss"].outlasted() for run in read_runs(paths)] == [True, False, False]


def test_scores_that_are_all_zero_are_blank(make_run):
    run = read_run(make_run(tasks=("a", "b"), scored=lambda row, column, metric, joint: 0.0 if row else math.nan))
    assert run.scores["exact_match"].blank()
    assert not read_run(make_run("other")).scores["exact_match"].blank()


def test_skipped_steps_as_results_or_events_have_them(make_run):
    path = make_run(skipped=3)
    assert (read_run(path).skipped, read_run(path).num_steps) == (3, 30)
    part = make_run("part", results=False)
    assert read_run(part).skipped == 0
    with (part / "metrics.jsonl").open("a") as file:
        for step in (30, 31, 31):  # a resumed run takes a step again
            file.write(json.dumps({"event": "skipped", "step": step, "task": "c", "reason": "loss"}) + "\n")
    assert read_run(part).skipped == 2


def test_half_a_line_is_left_out_and_counted(make_run):
    path = make_run()
    whole = read_run(path)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    run = read_run(path)
    assert run.unreadable == 1
    assert run.steps == whole.steps


def test_steps_that_a_resumed_run_repeats_count_once(make_run):
    path = make_run()
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "step", "step": 30, "task": "c", "stage": 3, "loss": 7.0}) + "\n")
    steps = read_run(path).steps
    assert [event["step"] for event in steps] == list(range(1, 31))
    assert steps[-1]["loss"] == 7.0


def test_events_alone_may_be_empty(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    run = read_run(tmp_path)
    assert run.scores == {}
    assert run.tasks == run.steps == ()


def test_runs_of_one_name_are_told_apart(make_run):
    runs = read_runs([make_run(folder="x/naive"), make_run(folder="y/naive"), make_run("replay")])
    assert [run.name for run in runs] == ["x/naive", "y/naive", "replay"]
    path = make_run(folder="z")
    assert [run.name for run in read_runs([path, path])] == ["runs/z", "runs/z (2)"]


def test_what_is_no_run_folder_is_refused_in_words(make_run, tmp_path):
    run = make_run()
    with pytest.raises(RunError, match="does not exist; give the folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match="is a file, not a run folder"):
        read_run(run / "config.yaml")
    with pytest.raises(RunError, match=r"neither results\.json nor metrics\.jsonl\. It holds runs: .*\(naive\)"):
        read_run(run.parent)
    with pytest.raises(RunError, match="no run folder was given"):
        read_runs([])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"format": 2}', "has format 2, this perdure reads up to 1"),
        ('{"format": 1,', "cannot be read as JSON"),
        ("[]", "must hold a JSON object, got list"),
        ('{"scores": {"loss": {"tasks": ["a"]}}}', "is not as perdure writes it"),
        (
            '{"scores": {"loss": {"higher_is_better": false, "tasks": ["a"], "stages": [], "values": []}}}',
            "do not fit their tasks and stages",
        ),
        ('{"scores": [1]}', "is not as perdure writes it"),
    ],
)
def test_damaged_results_are_refused_in_words(make_run, content, says):
    path = make_run()
    (path / "results.json").write_text(content)
    with pytest.raises(RunError, match=says):
        read_run(path)
