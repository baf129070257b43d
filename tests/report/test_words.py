"""Numbers and names in words."""

import math

import pytest

from perdure.report import read_runs, words


@pytest.mark.parametrize(
    ("metric", "x", "options", "text"),
    [
        ("exact_match", 0.912, {}, "91.2 %"),
        ("exact_match", -0.5, {"signed": True}, "−50.0 pt"),
        ("exact_match", 0.912, {"unit": False}, "91"),
        ("exact_match", -0.001, {"unit": False, "signed": True}, "0"),
        ("f1", 0.5714, {}, "57.1 %"),
        ("f1_inferred", 0.5, {"signed": True}, "+50.0 pt"),
        ("loss", 1.23456, {}, "1.235"),
        ("loss", 0.5, {"signed": True}, "+0.500"),
        ("loss", 12.345, {}, "12.35"),
        ("loss", 123456.0, {}, "1.2e+05"),
        ("loss", 0.0, {"signed": True}, "0.000"),
        ("loss", 0.0001, {}, "1.0e-04"),
        ("loss", math.nan, {}, "–"),
        ("loss", -math.inf, {}, "−∞"),
    ],
)
def test_values(metric, x, options, text):
    assert words.value(metric, x, **options) == text


def test_values_of_one_table_have_as_many_decimals():
    """Three below 100, two from there on; what is too large for digits is left out of the count."""
    columns = ([0.1, -12.0], [0.1, 123.0], [0.1, 2e5, math.nan], [])
    assert [words.decimals("loss", values) for values in columns] == [3, 2, 3, 3]
    assert words.decimals("exact_match", [0.1]) is None
    assert words.decimals("loss", [123.4], unit=False) == 0
    assert [words.value("loss", x, digits=3) for x in (0.0001, 12.345, -0.0001, 2e5)] == [
        "0.000", "12.345", "0.000", "2.0e+05",
    ]  # fmt: skip


def test_a_loss_is_no_accuracy():
    assert words.column("learning", "exact_match", True) == "learning accuracy ↑"
    assert words.column("learning", "loss", False) == "when learnt ↓"
    assert words.column("anytime_average", "loss", False) == "anytime average ↓"


def test_thousands_have_commas():
    assert [words.count(x) for x in (1074560, 12, None)] == ["1,074,560", "12", "–"]


def test_the_loss_stands_for_runs_only_where_all_have_nothing_else():
    assert words.main_metric(["loss", "exact_match"]) == "exact_match"
    assert words.main_metric(["loss", "loss"]) == words.main_metric([]) == "loss"


def test_arrows_turn_with_the_metric_only_for_averages():
    assert [words.arrow("average", better) for better in (True, False)] == ["↑", "↓"]
    assert [words.arrow("forgetting", better) for better in (True, False)] == ["↓", "↓"]
    assert [words.arrow("backward_transfer", better) for better in (True, False)] == ["↑", "↑"]


def test_long_names_keep_both_ends_and_stay_different():
    names = [f"the same start and {i} the same end of it" for i in range(3)]
    out = words.short([*names, "plain", "_hidden", "two\nlines", ""], 20)
    assert len(set(out)) == 7
    assert out[0].startswith("the same")
    assert all(len(name) <= 24 for name in out)
    assert out[3:] == ["plain", " _hidden", "two lines", "(no name)"]


def test_sentences_say_what_was_lost_and_kept(make_run):
    """Naive: below the best by (0.6 + 0.3) / 2 = 45 points, average 0.6; joint's is 0.9: kept 0.6 / 0.9 = 67 %."""
    text = words.sentences(read_runs([make_run(), make_run("joint", joint=True)]))
    assert text[0] == (
        "naive's exact match ended 45.0 points below each earlier task's best, on average; "
        "over 3 tasks, 90.0 % when learnt and 60.0 % at the end."
    )
    assert text[1] == "joint ended at a mean exact match of 90.0 % over 3 tasks, from 10.0 % before training."
    assert text[2] == "naive kept 67 % of joint's average."
    assert text[3] == "naive's exact match on the general probe went from 50.0 % to 25.0 %."


def test_a_loss_rises(make_run):
    """4 (1 - score): forgetting 4 * 0.45 = 1.8, learnt 4 * 0.1, average 4 * 0.4."""
    text = words.sentences(read_runs([make_run(metrics=("loss",))]))
    assert text[0] == (
        "naive's loss ended 1.800 above each earlier task's lowest, on average; "
        "over 3 tasks, 0.400 when learnt and 1.600 at the end."
    )


def test_a_run_that_kept_or_gained(make_run):
    """Task a is at 0.5 after its own stage and ends at 0.5, then at 0.8: 0 and 30 points from its best before."""

    def rows(end):
        return lambda row, column, metric, joint: ([0.1, 0.5, end], [0.1, 0.1, 0.7])[column][row]

    for end, says in ((0.5, "ended at each"), (0.8, "ended 30.0 points above each")):
        run = make_run(f"run-{end}", ("a", "b"), metrics=("exact_match",), scored=rows(end))
        assert words.sentences(read_runs([run]))[0].startswith(
            f"run-{end}'s exact match {says} earlier task's best, on average; over 2 tasks, 60.0 % when learnt"
        )


@pytest.mark.parametrize(
    ("columns", "moved"),
    [
        (([0.2, 0.2, 0.1], [0.0, 0.0, 0.9]), False),  # the last task moved, the earlier one did not
        (([0.2, 0.2, 0.3], [0.0, 0.0, 0.0]), True),
        (([math.nan, 0.2, 0.1], [0.0, 0.0, 0.0]), True),  # nobody knows where it began
        (([math.nan] * 3, [0.1, 0.1, 0.5]), True),  # the earlier task has no rows: the other one counts
        (([math.nan] * 3, [0.1, 0.1, 0.1]), False),
    ],
)
def test_whether_a_metric_moved_on_earlier_tasks(make_run, columns, moved):
    def scored(row, column, metric, joint):
        return columns[column][row] if metric == "exact_match" else -columns[column][row]

    (run,) = read_runs([make_run(tasks=("a", "b"), scored=scored)])
    assert words.moved(run.scores["exact_match"]) is moved
    assert words.moved(run.scores["loss"]) is moved


def only_the_last(row, column, metric, joint):
    """Exact match: 0.2 before on the first tasks and never more; the last task is learnt. The loss moves."""
    if metric == "loss":
        return [3.0, 1.0, 4.0, 9.0][row]
    return 0.5 * (column == 2 and row == 3) if column == 2 else 0.2 - 0.1 * (row == 3)


def test_what_was_never_learnt_by_exact_match_is_told_by_the_loss(make_run):
    """Loss, both earlier tasks: best 1.0 of rows 1 and 2, 9.0 at the end. Learnt: (1 + 4 + 9) / 3 = 4.667."""
    text = words.sentences(read_runs([make_run(scored=only_the_last), make_run("joint", joint=True)]))
    assert text[0] == (
        "naive's loss ended 8.000 above each earlier task's lowest, on average; "
        "over 3 tasks, 4.667 when learnt and 9.000 at the end. "
        "By exact match nothing was learnt on its earlier tasks: none rose above its score before training."
    )
    assert "kept" not in text[2]
    assert text[2] == "naive's mean loss is +8.600 against joint's."


def test_joint_training_may_teach_nothing_by_exact_match(make_run):
    def scored(row, column, metric, joint):
        return 2.0 - row if metric == "loss" else 0.0

    text = words.sentences(read_runs([make_run("joint", joint=True, scored=scored)]))
    assert text[0] == (
        "joint ended at a mean loss of 1.000 over 3 tasks, from 2.000 before training. "
        "By exact match nothing was learnt on its tasks: none rose above its score before training."
    )


def test_a_mean_says_over_how_many_tasks_it_is(make_run):
    """Task a has no evaluation row; b starts at 0.1, which is all that was measured before."""

    def scored(row, column, metric, joint):
        return math.nan if column == 0 else 0.1 + 0.2 * row

    run = make_run(tasks=("a", "b"), metrics=("exact_match",), scored=scored)
    assert words.sentences(read_runs([run]))[0] == (
        "naive ended at a mean exact match of 50.0 % over 1 of 2 tasks, from 10.0 % before training."
    )


def test_a_probe_without_answers_is_told_by_its_loss(make_run):
    text = words.sentences(read_runs([make_run(probe={"loss": [1.0, 2.5]})]))
    assert text[1] == "naive's loss on the general probe went from 1.000 to 2.500."


def test_skipped_steps_and_tasks_with_few_rows():
    """1 / 4 and 1 / 9 of a score."""
    assert words.skipped("naive", 12, 1250) == (
        "naive: 12 of 1,250 steps were skipped, since loss or gradient was not finite."
    )
    assert "1 of 8 steps was skipped" in words.skipped("naive", 1, 8)
    data = {name: {"evaluation": rows} for name, rows in {"a": 0, "b": 4, "c %": 9, "d": 10}.items()} | {"e": {}}
    assert words.few(data) == [
        "a has no evaluation rows: it was not scored and stands in no mean.",
        "b has 4 evaluation rows: each is 25.0 % of its score.",
        "c % has 9 evaluation rows: each is 11.1 % of its score.",
    ]


def test_an_unfinished_run_is_called_so(make_run):
    text = words.sentences(read_runs([make_run(results=False)]))
    assert text[0].startswith("naive stands at a mean exact match of 60.0 %")
    assert text[-1].startswith("naive is not finished")


def test_inferred_metrics_have_names_and_units():
    assert words.label("exact_match_inferred") == "exact match, task inferred"
    assert words.label("loss_inferred") == "loss, task inferred"
    assert words.label("f1_inferred") == "F1, task inferred"
    assert words.value("accuracy_inferred", 0.5) == "50.0 %"


def test_sentences_say_where_the_task_was_told(make_run, told_run):
    """Told 90 %, inferred 45 %, and joint is at 90 %."""
    text = words.sentences(read_runs([told_run(), make_run("joint", joint=True)]))
    assert text[0].endswith("It was told the task of each row; where it infers the task, it is at 45.0 %.")
    assert text[2] == "packnet kept 100 % of joint's average, told the task; 50 % where it infers it."
