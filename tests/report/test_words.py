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
    """Naive: forgetting (0.6 + 0.3) / 2 = 45 points, average 0.6; joint's average is 0.9: kept 0.6 / 0.9 = 67 %."""
    text = words.sentences(read_runs([make_run(), make_run("joint", joint=True)]))
    assert text[0] == (
        "naive lost 45.0 points of exact match on what it had learnt: "
        "90.0 % when learnt, 60.0 % on average at the end."
    )
    assert text[1] == "joint ended at a mean exact match of 90.0 % over 3 tasks, from 10.0 % before training."
    assert text[2] == "naive kept 67 % of joint's average."
    assert text[3] == "On the general probe, naive went from 50.0 % to 25.0 % exact match."


def test_a_loss_rises(make_run):
    """4 (1 - score): forgetting 4 * 0.45 = 1.8, learnt 4 * 0.1, average 4 * 0.4."""
    text = words.sentences(read_runs([make_run(metrics=("loss",))]))
    assert text[0] == (
        "naive's loss on what it had learnt rose by 1.800: 0.400 when learnt, 1.600 on average at the end."
    )


def test_an_unfinished_run_is_called_so(make_run):
    text = words.sentences(read_runs([make_run(results=False)]))
    assert text[0].startswith("naive stands at a mean exact match of 60.0 %")
    assert text[-1].startswith("naive is not finished")
