"""RESULTS_SUMMARY.md and what the terminal shows: the tables' text, and what is called a difference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from perdure.recipes.arena.show import print_results
from perdure.report.arena import arena_run
from perdure.report.arena_pool import Group
from perdure.report.arena_run import ArenaRun, Estimate
from perdure.report.arena_summary import against_first, kinds, phases, summary, table

from .arena_runs import EIGHT, results


def content(**more: Any) -> dict[str, Any]:
    """Two kinds whose numbers are round."""
    found = results(kinds=("math", "code|x"), rows=200, **more)
    found.update(initial=0.0, final=0.6, best=0.7, best_episode=70)
    found["intervals"] = {"initial": [0.0, 0.02], "final": [0.53, 0.67], "best": [0.63, 0.76]}
    found["stated"] = {"initial": 0.1, "final": 0.65, "best": 0.75}
    found["elicitation"] = {"known": 0.45, "elicited": 0.43, "learnt": 0.19, "lost": 0.02}
    for kind, final in (("math", 0.8), ("code|x", 0.4)):
        found["kinds"][kind] = {
            "rows": 100, "initial": 0.0, "final": final, "best": final,
            "intervals": {"initial": [0.0, 0.037], "final": [final - 0.1, final + 0.08], "best": [final, final]},
            "stated": {"initial": 0.1, "final": final, "best": final},
            "plain": {"initial": 0.75, "final": 0.7} if kind == "math" else None,
            "elicitation": {"known": 0.8, "elicited": 0.75, "learnt": 0.05, "lost": 0.0}
            if kind == "math" else {"known": 0.1, "elicited": 0.1, "learnt": 0.3, "lost": 0.0},
        }  # fmt: skip
    found["phases"] = [
        {"name": "rapid learning", "from": 0, "to": 20, "gain": 0.5},
        {"name": "stable", "from": 20, "to": 80, "gain": 0.1},
    ]
    return found


def with_final(run: ArenaRun, final: Estimate, **more: Any) -> ArenaRun:
    exact = replace(run.scores.exact, final=final)
    return replace(run, scores=replace(run.scores, exact=exact), results={**run.results, **more})


ONE = arena_run(content())


def test_the_tables_of_a_run() -> None:
    group = Group("lora", (ONE,))
    assert kinds(group) == (
        "| kind | held-out rows | initial | final | change, points |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| math | 100 | 0.0 % (0.0–3.7) | 80.0 % (70.0–88.0) | +80.0 |\n"
        "| code\\|x | 100 | 0.0 % (0.0–3.7) | 40.0 % (30.0–48.0) | +40.0 |"
    )
    assert phases([group]) == (
        "| run | phase | episodes | gain, points |\n"
        "| --- | --- | ---: | ---: |\n"
        "| lora | rapid learning | 0–20 | +50.0 |\n"
        "| lora | stable | 20–80 | +10.0 |"
    )
    assert table(["a", "b"], [["x\ny", "|"]]) == "| a | b |\n| --- | ---: |\n| x y | \\| |"


def test_the_phases_of_several_seeds() -> None:
    """Gains of 50 and 30 points: 40 ± t(0.975, 1) · 14.142 / √2 = 40 ± 12.7062 · 10 = −87.1 to 167.1."""
    first, *_ = ONE.phases
    other = replace(ONE, phases=(replace(first, end=30, gain=0.3),))
    text = phases([Group("lora", (ONE, other))])
    assert "| lora (n = 2) | rapid learning | differ by seed | +40.0 (−87.1 to +167.1) |" in text
    assert "| lora (n = 2) | stable (1 of 2 seeds) | 20–80 | +10.0 |" in text


def test_what_is_said_of_each_against_the_first() -> None:
    runs = {
        "same": with_final(ONE, Estimate(0.7, 0.67, 0.73)),
        "better": with_final(ONE, Estimate(0.9, 0.85, 0.93)),
        "worse": with_final(ONE, Estimate(0.2, 0.15, 0.25), seed=1),
        "other rows": with_final(ONE, Estimate(0.9, 0.85, 0.93), levels=[5], eval_tasks=30),
    }
    lines, note = against_first([Group("lora", (ONE,)), *(Group(name, (run,)) for name, run in runs.items())])
    assert lines.split("\n") == [
        "- same: no difference from lora that these intervals show: 70.0 % (67.0–73.0) against 60.0 % (53.0–67.0).",
        "- better ended 30.0 points above lora: 90.0 % (85.0–93.0) against 60.0 % (53.0–67.0).",
        "- worse ended 40.0 points below lora: 20.0 % (15.0–25.0) against 60.0 % (53.0–67.0).",
        "- other rows: not compared, since what was measured differs (held-out rows: 200 against 30; "
        "levels: 1, 2, 3 against 5).",
    ]
    assert note == "Runs of other seeds are scored on other held-out rows of the same sort, drawn with their seeds."
    assert len(against_first([Group("lora", (ONE,)), Group("same", (runs["same"],))])) == 1


def test_runs_of_the_same_seeds_are_compared_seed_by_seed() -> None:
    """Differences of 2, 3 and 4 points are 3 ± t(0.975, 2) · 1 / √3 = 3 ± 2.48, however far seeds lie apart."""

    def group(name: str, *finals: float, first: int = 0) -> Group:
        runs = [with_final(ONE, Estimate(final), seed=first + i) for i, final in enumerate(finals)]
        return Group(name, tuple(runs))

    base = group("lora", 0.3, 0.6, 0.9)
    others = [
        group("more", 0.32, 0.63, 0.94),
        group("less", 0.28, 0.57, 0.86),
        group("like", 0.32, 0.57, 0.9),
        group("steps", 0.31, 0.61, 0.91),
        group("equal", 0.3, 0.6, 0.9),
        group("elsewhere", 0.99, 0.98, 0.97, first=7),
    ]
    said = [line.split(": ")[1] for line in against_first([base, *others])[0].split("\n")]
    assert said == [
        "3.0 points above lora (0.5 to 5.5) seed by seed, over 3",
        "3.0 points below lora (0.5 to 5.5) seed by seed, over 3",
        "no difference from lora that can be told",
        "1.0 points above lora on each of 3 seeds",
        "equal to lora seed by seed, over 3",
        "no difference from lora that these intervals show",
    ]


def test_the_whole_page() -> None:
    adapted = {"shots": 5, "steps": 3, "initial": {"exact_match": 0.1}, "final": {"exact_match": 0.6}}
    meta = arena_run(content(name="maml", method="maml", adapted=adapted, machine={"threads": 4}))
    page = summary([Group("lora", (ONE,)), Group("maml", (meta,))])
    heads = [line for line in page.split("\n") if line.startswith("#")]
    assert heads == [
        "# Results in the arena", "## Headline", "## Against the first", "## By kind", "### lora", "### maml",
        "## Phases of learning", "## Elicitation or learning", "### lora", "### maml", "## What was run",
    ]  # fmt: skip
    for line in (
        "| lora | nano | lora | 12,288 | 0.0 % | 60.0 % (53.0–67.0) | 70.0 % | +60.0 | −1.0 pt | 0.042 |",
        "maml: After adapting to 5 rows of a kind in 3 steps: 10.0 % before the episodes, 60.0 % after them.",
        "| right answer stated | 10.0 % | 65.0 % |",
        "| exact match in the wording of pretraining (1 of 2 kinds) | 70.0 % | 65.0 % |",
        "| math | 0.0 % → 80.0 % | 10.0 % → 80.0 % | 75.0 % → 70.0 % | 80.0 % | 75.0 | 5.0 |",
        "| code\\|x | 0.0 % → 40.0 % | 10.0 % → 40.0 % | – | 10.0 % | 10.0 | 30.0 |",
        "Before training 45.0 % of the rows were right in some reading. The gain of 60.0 points: 43.0 are rows "
        "known in another reading (elicitation of the format), 19.0 rows that were right in none (learning), less "
        "2.0 of rows that were right and are no longer.",
        "| lora | 0 | 80 | naive | 1, 2, 3 | off | off | all | 1 |",
        "perdure arena --method maml --seed 0 --out runs/maml-0",
        "Versions: perdure 0.1.0, torch 2.8.0.",
        "Machine of maml (seed 0): threads 4.",
    ):
        assert line in page.split("\n"), line
    assert "](complete_comparison.png)" in page
    assert "](results_table.png)" in page
    alone = summary([Group("lora", (ONE,))])
    assert "Against the first" not in alone
    assert "does not say what another seed would give" in alone


def test_a_run_on_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_results(content())
    out = capsys.readouterr().out
    for text in (
        "lora on nano: 80 episodes, measured on 200 held-out rows",
        "exact match 0.0 % (0.0–2.0) -> 60.0 % (53.0–67.0)",
        "best 70.0 % (63.0–76.0) after episode 70; intervals are of 95 %",
        "rows that were right in none",
        "general probe, exact match: 81.0 % -> 80.0 % (−1.0 pt)",
        "0.042 s an episode; 12,288 of 1,200,000 parameters trained",
    ):
        assert text in out, text
    rows = [line.split() for line in out.split("\n")]
    assert ["math", "100", "0.0", "(0.0–3.7)", "80.0", "(70.0–88.0)", "+80.0", "80.0"] in rows
    wide = results(
        kinds=(*EIGHT, "a_kind_of_a_name_that_is_far_too_long_for_it"), model="org/" + "M" * 90, probe=None
    )
    print_results(wide)
    assert max(map(len, capsys.readouterr().out.split("\n"))) <= 80
    fallen = content()
    fallen.update(initial=0.7)
    print_results(fallen)
    assert "Exact match did not rise." in capsys.readouterr().out
