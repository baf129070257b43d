"""The figures of arena runs: what they draw, nothing outside the picture, no text on another, equal bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from matplotlib.collections import PolyCollection
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from perdure.report import canvas
from perdure.report.arena import arena_run
from perdure.report.arena_comparison import comparison, draw_comparison
from perdure.report.arena_curves import draw_curves, learning_curves, running
from perdure.report.arena_pool import Group, over_seeds, pooled
from perdure.report.arena_run import ArenaRun, Episode
from perdure.report.arena_table import HEADS, draw_table, results_table

from .arena_runs import EIGHT, FIVE, results
from .test_histories import drawn

LONG = "a run with a very long name that goes on, $x_1$, and on until nobody reads it any more, number"


def run_of(*, episodes: int = 80, **options: Any) -> ArenaRun:
    """A run that answers wrong before each step and right after it; in blocks, a kind after another."""
    content = results(episodes=episodes, **options)
    kinds = content["tasks"]
    log = [
        {"event": "episode", "episode": i + 1, "kind": kinds[i * len(kinds) // episodes], "right_before": False,
         "right_after": True} for i in range(episodes)
    ]  # fmt: skip
    return arena_run(content, "runs/x", tuple(log))


def seeds(num: int, **options: Any) -> list[ArenaRun]:
    runs = [run_of(seed=seed, end=0.6 + 0.03 * seed, **options) for seed in range(num)]
    return [replace(run, config={"method": run.method}) for run in runs]


def brute(values: Sequence[float], width: int) -> list[float]:
    out = []
    for end in range(1, len(values) + 1):
        last = [x for x in values[max(0, end - width) : end] if not math.isnan(x)]
        out.append(sum(last) / len(last) if last else math.nan)
    return out


def test_the_running_share_is_that_of_the_last_ones() -> None:
    values = [float(i * i % 7 < 3) for i in range(50)]
    values[3] = values[4] = math.nan
    for width in (1, 2, 20):
        assert running(values, width) == pytest.approx(brute(values, width), nan_ok=True)
    assert running([], 5) == []


def test_curves_of_one_run() -> None:
    run = run_of()
    figure = drawn(lambda: draw_curves(run))
    overall, kinds, online = figure.axes
    lines = {str(line.get_label()): line for line in overall.lines}
    assert list(lines) == ["exact match", "answer stated (lenient)", "general probe"]
    exact = [(point.episode, point.exact.value) for point in run.history]
    assert list(zip(*lines["exact match"].get_data(), strict=True)) == exact
    (band,) = [found for found in overall.collections if isinstance(found, PolyCollection)]
    ends = {round(float(y), 9) for _, y in band.get_paths()[0].vertices}  # type: ignore[union-attr]
    assert {round(x, 9) for point in run.history for x in (point.exact.low, point.exact.high)} <= ends
    assert [str(line.get_label()) for line in kinds.lines] == list(FIVE)
    after, before = online.lines
    assert (set(after.get_ydata()), set(before.get_ydata())) == ({1.0}, {0.0})
    assert online.get_title() == "episodes answered right, over the last 20"
    assert figure.get_suptitle() == "lora on nano, measured on 500 held-out rows"


def test_blocks_are_shaded_and_named_where_there_is_room() -> None:
    for episodes, kinds in ((80, FIVE), (1000, EIGHT)):
        run = run_of(drift="blocks", kinds=kinds, episodes=episodes, name=LONG, model="org/" + "M-" * 60)
        figure = drawn(lambda run=run: draw_curves(run))  # type: ignore[misc]
        shaded = [[p for p in ax.patches if isinstance(p, Rectangle)] for ax in figure.axes]
        assert [len(found) for found in shaded] == [len(kinds)] * 3
        assert [text.get_text() for text in figure.axes[0].texts] == list(kinds)
        apart(list(figure.axes[0].texts))
    assert figure.axes[2].get_title() == "episodes answered right, over the last 50"
    narrow = run_of(drift="blocks", kinds=("a kind of a long name", *FIVE, "b", "c"), episodes=80)
    texts = [text.get_text() for text in draw_curves(narrow).axes[0].texts]
    assert "b" in texts
    assert not any("long name" in text for text in texts)
    assert not [p for p in draw_curves(run_of()).axes[0].patches if isinstance(p, Rectangle)]


def test_without_a_log_there_are_two_panels() -> None:
    bare = arena_run(results())
    assert len(drawn(lambda: draw_curves(bare)).axes) == 2
    unasked = replace(bare, log=(Episode(1, "math", math.nan, math.nan),))
    assert len(drawn(lambda: draw_curves(unasked)).axes) == 2


def apart(texts: Sequence[Text]) -> None:
    """No two texts touch."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    for (one, first), (other, second) in combinations(boxes, 2):
        assert not first.overlaps(second), f"{one!r} lies on {other!r}"


@pytest.mark.parametrize("case", ["one", "seeds", "many"])
def test_six_panels(case: str) -> None:
    runs = {
        "one": [run_of()],
        "seeds": [*seeds(3), *seeds(3, method="soft-prompt", name="soft-prompt")],
        "many": [run_of(name=f"{LONG} {i}", kinds=EIGHT if i % 2 else FIVE, probe=None) for i in range(9)],
    }[case]
    groups = pooled(runs)
    figure = drawn(lambda: draw_comparison(groups))
    assert len(figure.axes) == 6
    over, moments, kinds, phases, _, costs = figure.axes
    assert len(over.lines) == len(groups)
    num_kinds = 8 if case == "many" else 5
    assert [len(tick.get_text()) > 0 for tick in kinds.get_xticklabels()] == [True] * num_kinds
    assert [tick.get_text() for tick in phases.get_xticklabels()] == ["rapid learning", "steady gains", "stable"]
    assert [tick.get_text() for tick in moments.get_xticklabels()] == ["initial", "final", "best"]
    assert len(costs.texts) == len(groups)
    apart(list(costs.texts))
    for ax in (moments, kinds, phases):
        apart([text for text in ax.texts if text.get_text()])
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert len(set(names)) == len(groups)
    if case == "one":  # a change of one point looks small: the axis goes from −5 to +5 at least
        (bar,) = [patch for patch in costs.patches if isinstance(patch, Rectangle)]
        assert bar.get_width() == pytest.approx(-0.01)
        assert costs.get_xlim()[0] <= -0.05
        assert costs.texts[0].get_text() == "−1.0 pt, 0.042 s an episode\n12,288 parameters trained"
    if case == "seeds":
        assert names == ["lora (n = 3)", "soft-prompt (n = 3)"]
        mean = over_seeds(run.scores.exact.final.value for run in runs[:3])
        heights = [patch.get_height() for patch in moments.patches if isinstance(patch, Rectangle)]
        assert any(height == pytest.approx(mean.value) for height in heights)
        assert "over seeds" in figure.get_suptitle()
    if case == "many":
        assert "Not all were scored on the same held-out rows" in figure.get_suptitle()
        assert "no probe" in costs.texts[0].get_text()


def test_no_cell_of_the_table_lies_on_another() -> None:
    groups = pooled(
        [
            run_of(name=f"{LONG} {i}", model="some-organisation/A-Model-With-A-Very-Long-Name-1.1B-v0.3-GPTQ-Int4")
            for i in range(3)
        ]
    )
    figure = drawn(lambda: draw_table(groups))
    (ax,) = figure.axes
    apart(list(ax.texts))
    shown = " ".join(text.get_text() for text in ax.texts)
    assert all(word in shown for head in HEADS for word in head.split())
    assert "12,288" in shown
    assert figure.get_figwidth() < 12


@pytest.mark.parametrize("make", [learning_curves, comparison, results_table])
def test_equal_runs_give_equal_bytes(make: Callable[[Any], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canvas, "DPI", 30)
    runs = [run_of(), run_of()]
    one, other = (make(run if make is learning_curves else [Group("a", (run,))]) for run in runs)
    assert one == other
    assert one.startswith(b"\x89PNG")
