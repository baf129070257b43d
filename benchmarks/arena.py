"""Online learning in the arena on nano: default runs, an invented code, drift in blocks, and how fast it is.

Runs what is missing with `perdure arena`, five seeds of the defaults and three of the rest, and prints the tables
for docs/results.md: mean ± 95 % t-interval over seeds. `--speed` times an episode, and 500 held-out problems by
batched generation against one by one, in one process.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study_report import interval

Results = Mapping[str, Any]
# name -> seeds, and the options of `perdure arena`.
RUNS: dict[str, tuple[int, list[str]]] = {
    "lora": (5, []),
    "soft-prompt": (5, ["--method", "soft-prompt"]),
    "full": (5, ["--method", "full"]),
    "multi-lora": (5, ["--method", "multi-lora"]),
    "reptile": (5, ["--method", "reptile"]),
    "maml": (5, ["--method", "maml"]),
}
NEW = ["--kinds", "cipher", "--episodes", "1000", "--eval-every", "100", "--eval-tasks", "200"]
RUNS |= {
    "cipher-lora": (3, [*NEW, "--lr", "1e-3"]),
    "cipher-full": (3, [*NEW, "--method", "full", "--lr", "3e-4", "--window", "4"]),
}
DRIFT = ["--drift", "blocks", "--episodes", "400", "--eval-every", "40", "--window", "4", "--lr", "1e-3"]
DRIFT += ["--set", "answers=framed"]  # one kind's form of answer is lost to the next one's
TWICE = ["--set", "continual_strategy.replay.ratio=2"]
RUNS |= {
    "drift": (3, DRIFT),
    "drift-replay": (3, [*DRIFT, "--replay", "reservoir"]),
    "drift-replay-all": (3, [*DRIFT, "--replay", "reservoir", "--memory", "400", *TWICE]),
    "drift-multi-lora": (3, [*DRIFT, "--method", "multi-lora"]),
}


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/arena"), help="folder (runs/arena)")
    parser.add_argument("--only", default=",".join(RUNS), help="names of runs, commas between")
    parser.add_argument("--first-seed", type=int, default=0, help="of each run; settings were chosen on 10 to 12")
    parser.add_argument("--report", action="store_true", help="only print tables of the runs there are")
    parser.add_argument("--speed", action="store_true", help="only time")
    asked = parser.parse_args()
    if asked.speed:
        print(speed())
        return
    names = asked.only.split(",")
    for name in names:
        count, options = RUNS[name]
        for seed in range(asked.first_seed, asked.first_seed + count):
            if not asked.report:
                run(asked.out / f"{name}-seed{seed}", options, seed)
    print(headline(asked.out, names))
    print("\n" + by_kind(asked.out, names))
    print("\n" + drift(asked.out, [name for name in names if name.startswith("drift")]))


def run(out: Path, options: Sequence[str], seed: int) -> None:
    """One run, unless it is there."""
    if (out / "results.json").is_file():
        return
    command = [sys.executable, "-m", "perdure.cli", "arena", *options, "--seed", str(seed), "--out", str(out)]
    subprocess.run([*command, "--resume"], check=True)


def results_of(out: Path, name: str) -> list[Results]:
    """The finished runs of a name, by seed."""
    files = sorted(out.glob(f"{name}-seed[0-9]*/results.json"))
    return [json.loads(file.read_text()) for file in files]


def headline(out: Path, names: Sequence[str]) -> str:
    """A line for each run: before and after, strictly, leniently, in nano's own wording; and the probe."""
    lines = [
        "| run | seeds | trained | exact match before | after | best | stated before | after "
        "| nano's wording before | after | probe before | change | seconds an episode |",
        "|---|" + "---:|" * 12,
    ]
    for name in names:
        found = results_of(out, name)
        if not found:
            continue
        parts: list[Callable[[Results], float | None]] = [
            lambda r: r["initial"],
            lambda r: r["final"],
            lambda r: r["best"],
            lambda r: r["stated"]["initial"],
            lambda r: r["stated"]["final"],
            lambda r: r["pretraining_wording"] and r["pretraining_wording"]["initial"]["exact_match"],
            lambda r: r["pretraining_wording"] and r["pretraining_wording"]["final"]["exact_match"],
            lambda r: r["probe"]["exact_match"][0],
            lambda r: r["probe"]["exact_match"][1] - r["probe"]["exact_match"][0],
        ]
        cells = [percent([part(one) for one in found]) for part in parts]
        seconds = statistics.median(one["seconds_per_episode"] for one in found)
        trained = f"{found[0]['parameters']['trainable']:,}"
        lines.append(f"| {name} | {len(found)} | {trained} | " + " | ".join(cells) + f" | {seconds:.3f} |")
    return "\n".join(lines)


def by_kind(out: Path, names: Sequence[str]) -> str:
    """Before and after by kind, as the first of the earlier systems reported it."""
    found = {name: results for name in names if (results := results_of(out, name))}
    lines = [
        "| run | kind | before | after | change | stated before | nano's wording before |",
        "|---|---|" + "---:|" * 5,
    ]
    for name, results in found.items():
        for kind in results[0]["kinds"]:
            own = [one["kinds"][kind] for one in results]
            cells = [
                percent([k["initial"] for k in own]),
                percent([k["final"] for k in own]),
                percent([k["final"] - k["initial"] for k in own]),
                percent([k["stated"]["initial"] for k in own]),
                percent([k["plain"] and k["plain"]["initial"] for k in own]),
            ]
            lines.append(f"| {name} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def drift(out: Path, names: Sequence[str]) -> str:
    """How far each kind stands below its peak at the end of a stream in blocks; the last had no time to fall."""
    lines = ["| run | seeds | below the peak, mean of all kinds but the last | the kind that fell most | final |"]
    lines.append("|---|" + "---:|" * 4)
    for name in names:
        found = results_of(out, name)
        falls = [[fall(one, kind) for kind in one["tasks"][:-1]] for one in found]
        if not found:
            continue
        cells = [
            percent([sum(one) / len(one) for one in falls]),
            percent([max(one) for one in falls]),
            percent([one["final"] for one in found]),
        ]
        lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fall(results: Results, kind: str) -> float:
    """The kind's highest exact match minus its last, 0 to 1."""
    scores = [entry["kinds"][kind] for entry in results["history"]]
    return float(max(scores) - scores[-1])


def percent(values: Sequence[float | None]) -> str:
    """Mean ± half the 95 % interval, in percent."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    middle, half = interval(known) if len(known) > 1 else (known[0], math.nan)
    return f"{middle:.1f}" + (f" ± {half:.1f}" if math.isfinite(half) else "")


def speed() -> str:
    """Seconds of an episode, and of 500 answers batched and one by one, in turn, medians."""
    from perdure.recipes.arena.command import make_plan
    from perdure.recipes.arena.options import Options, settings_of
    from perdure.recipes.run import quieten
    from perdure.training.attempt import attempt
    from perdure.training.display import Display
    from perdure.types import Task

    quieten()
    plan: Any = make_plan(settings_of(Options(), ["probe=false"]), Display())
    plan.learner.begin_task(Task("stream", plan.episodes.rows), 0, 80)
    episodes = []
    for _ in range(80):
        began = time.perf_counter()
        row = plan.episodes.next()
        attempt(plan.measure, row, plan.max_new_tokens)
        plan.updates.learn(row)
        attempt(plan.measure, row, plan.max_new_tokens)
        episodes.append(time.perf_counter() - began)
    prompts, longest = plan.exam.paper.prompts, plan.exam.longest
    batched, single = [], []
    for _ in range(3):
        began = time.perf_counter()
        together = plan.measure.tokens(prompts, longest)
        batched.append(time.perf_counter() - began)
        began = time.perf_counter()
        alone = [plan.measure.tokens([prompt], longest)[0] for prompt in prompts]
        single.append(time.perf_counter() - began)
        assert together == alone, "batched and one by one differ"
    ratio = statistics.median(b / s for b, s in zip(batched, single, strict=True))
    return (
        f"an episode: {1000 * statistics.median(episodes):.1f} ms (median of 80)\n"
        f"{len(prompts)} answers: {statistics.median(batched):.2f} s batched, {statistics.median(single):.2f} s "
        f"one by one, ratio {ratio:.3f} (median of 3, in turn)"
    )


if __name__ == "__main__":
    main()
