"""The command line from end to end on a tiny run: what is printed, what is written, and how it goes on."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("undrawn")


def results(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "results.json").read_text()))


def test_help_is_there_at_once() -> None:
    """Half a second, as the best of several: a busy machine makes single ones slow."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "perdure.cli", "--help"], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0
        if times[-1] < 0.5:
            break
    assert min(times) < 0.5
    for command in ("demo", "run", "extend", "erase", "audit", "verify", "evaluate", "generate", "list", "report"):
        assert command in done.stdout


def test_version_and_usage(perdure: Callable[..., Any]) -> None:
    assert perdure("--version").out.startswith("perdure ")
    assert perdure("run").code == 2
    assert perdure("nosuch").code == 2
    assert perdure("run", "arena-tasks", "--seed", "-1").code == 2


def test_list(perdure: Callable[..., Any]) -> None:
    everything = perdure("list")
    assert everything.code == 0
    for name in (
        "strategies:",
        "naive",
        "replay",
        "ewc",
        "joint",
        "isolated",
        "arena-tasks",
        "lora",
        "soft-prompt",
        "exact_match",
        "answers:",
        "f1 ",
        "memories:",
        "class-balanced",
    ):
        assert name in everything.out
    assert perdure("list", "tunings").out.startswith("full")
    unknown = perdure("list", "strategys")
    assert unknown.code == 2
    assert "Did you mean 'strategies'?" in unknown.err


def test_all_things_have_one_line_each(perdure: Callable[..., Any]) -> None:
    from perdure.recipes.catalogue import catalogue

    kinds = catalogue()
    lines = perdure("list").out.splitlines()
    assert len(lines) == len(kinds) + sum(map(len, kinds.values()))


def test_strategies_are_listed_with_what_they_need_and_cost(perdure: Callable[..., Any]) -> None:
    """Under each name its facts, word for word, in 80 columns; the references have their line alone."""
    from perdure.strategies import STRATEGIES

    printed = perdure("list", "strategies").out
    assert max(map(len, printed.splitlines())) <= 80
    parts = re.split(r"^(?=\S)", printed, flags=re.MULTILINE)[1:]
    found = {part.split()[0]: " ".join(part.split()) for part in parts}
    assert list(found) == [*STRATEGIES, "joint", "isolated"]
    for name, strategy in STRATEGIES.items():
        facts = f"needs {strategy.needs} cost {strategy.cost} source {strategy.source}"
        assert found[name] == f"{name} {strategy.summary} {facts}"
    assert "needs" not in found["joint"]
    labels = {line[:10] for line in printed.splitlines() if line.startswith("  ") and line[2] != " "}
    assert labels == {"  needs   ", "  cost    ", "  source  "}


def test_memories_are_listed(perdure: Callable[..., Any]) -> None:
    from perdure.memory import BUFFERS

    printed = perdure("list", "memories").out
    assert [line.split()[0] for line in printed.splitlines() if line[0] != " "] == list(BUFFERS)
    assert " ".join(printed.split()) == " ".join(f"{name} {line}" for name, line in BUFFERS.items())


def test_a_run_prints_its_table_and_writes_its_folder(finished_run: Path, recipe: Path) -> None:
    printed = (finished_run / "printed.txt").read_text()
    table = printed[printed.index(" of each task at the end (") :]
    table = table[: table.index("run:    ")].splitlines()
    assert max(map(len, table)) <= 80
    for row in (
        "ones", "threes", "average", "learning accuracy", "forgetting", "backward transfer",
        "general probe, before", "general probe, after", "replayed share of rows",
        "replayed share of target tokens", "steps", "seconds",
    ):  # fmt: skip
        assert any(line.strip().startswith(row) for line in table), row
    assert f"run:    {finished_run}" in printed
    found = results(finished_run)
    assert found["command"] == shlex.join(["perdure", "run", str(recipe), "--out", str(finished_run)])
    assert (found["steps"], found["tasks"]) == (8, ["ones", "threes"])
    assert yaml.safe_load((finished_run / "config.yaml").read_text())["recorded"]["commands"] == [found["command"]]
    for name in ("metrics.jsonl", "scores.csv", "report.html", "model/model.safetensors", "checkpoints/final"):
        assert (finished_run / name).exists(), name
    # As HTML has it: quotes in the path would be escaped, but there are none.
    assert found["command"] in (finished_run / "report.html").read_text()


def test_erase(perdure: Callable[..., Any], finished_run: Path, recipe: Path, tmp_path: Path) -> None:
    from perdure.training.folder import RunFolder
    from perdure.training.plan import make_plan

    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    row = make_plan(RunFolder(run).settings(), RunFolder(run).recipe_folder).stages[1].train[0]
    for given, message in (
        ((), "nothing to erase: give --key, or --match field=value"),
        (("--key", "nobody"), "no row of this run has the key 'nobody'"),
        (("--match", "level"), "--match 'level': must be field=value"),
        (("--match", "level=3"), "--match level=3: no row of this run matches; its rows have no fields"),
        (("--resume",), "no erasure was stopped here"),
    ):
        refused = perdure("erase", run, *given)
        assert (refused.code, message in refused.err) == (2, True), refused.err
    done = perdure("erase", run, "--key", row.key)
    assert (done.code, done.err) == (0, "")
    assert "training threes again, from stage-001-step-00000004" in done.out
    assert f"record: {run / 'erasures.jsonl'}" in done.out
    first = make_plan(RunFolder(run).settings(), RunFolder(run).recipe_folder).stages[0].train[0]
    assert perdure("erase", run, "--key", first.key).code == 0
    assert results(run)["command"] == results(finished_run)["command"]
    assert "erased already" in perdure("erase", run, "--key", first.key).out
    assert f"{first.key}: erased" in perdure("audit", run, "--key", first.key).out
    texts = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "printed.txt"}
    for key in (row.key, first.key):
        assert [path for path, text in texts.items() if key.encode() in text] == []
    assert results(run)["data"]["threes"]["train"] == results(finished_run)["data"]["threes"]["train"] - 1
    assert "finished; nothing to do" in perdure("run", recipe, "--out", run, "--resume").out

    lines = (run / "erasures.jsonl").read_text().splitlines()
    (run / "erasures.jsonl").write_text(lines[0] + "\n")
    for command in (("run", recipe, "--out", run, "--resume"), ("erase", run, "--key", "x")):
        pending = perdure(*command)
        assert (pending.code, f"finish it first: perdure erase {run} --resume" in pending.err) == (2, True)
    assert perdure("erase", run, "--resume").code == 0


def test_a_task_is_read_by_its_own_template(perdure: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    """The rows have other columns than the default template's; a finished run with other rows is told of."""
    folder = shutil.copytree(recipe.parent, tmp_path / "here")
    lines = (folder / "ones.jsonl").read_text().replace('"prompt"', '"asks"').replace('"answer"', '"says"')
    (folder / "asked.jsonl").write_text(lines)
    text = (folder / "tiny.yaml").read_text()
    task = 'train: asked.jsonl, holdout: 4, answers: hotpot, template: {prompt: "{asks}", answer: "{says}"}}'
    (folder / "tiny.yaml").write_text(text.replace("train: ones.jsonl, evaluation: ones-held.jsonl}", task))
    given = ("run", folder / "tiny.yaml", "--out", tmp_path / "run")
    assert perdure(*given).code == 0
    assert perdure("evaluate", tmp_path / "run", "--data", folder / "asked.jsonl").code == 0
    scored = json.loads((tmp_path / "run" / "evaluation-asked.json").read_text())["scores"]["asked"]
    assert set(scored) == {"loss", "exact_match", "f1"}
    assert "nothing to do" in perdure(*given, "--resume").out
    (folder / "other.yaml").write_text(
        "name: x/../../y\ntrain: asked.jsonl\ntemplate: {prompt: '{says}', answer: '{asks}'}\nanswers: plain"
    )
    assert perdure("evaluate", tmp_path / "run", "--data", folder / "other.yaml").code == 0
    scored = json.loads((tmp_path / "run" / "evaluation-x_.._.._y.json").read_text())["scores"]["x/../../y"]
    assert set(scored) == {"loss", "exact_match"}
    (folder / "asked.jsonl").rename(folder / "gone.jsonl")
    assert "cannot be compared" in perdure(*given, "--resume").out
    (folder / "asked.jsonl").write_text("".join(lines.splitlines(keepends=True)[:9]))
    for command in ((*given, "--resume"), ("verify", tmp_path / "run")):
        refused = perdure(*command)
        assert (refused.code, "task ones: its training rows changed" in refused.err) == (2, True), refused
        assert "start a new run in another folder" in refused.err
        assert str(tmp_path / "run") in refused.err
    assert "and another file now" in perdure("audit", tmp_path / "run").out


def test_a_torn_final_checkpoint_is_made_again(
    perdure: Callable[..., Any], finished_run: Path, recipe: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    before = (run / "checkpoints" / "final" / "state.safetensors").read_bytes()
    (run / "checkpoints" / "final" / "state.safetensors").write_bytes(b"torn")
    audited = perdure("audit", run)
    assert (audited.code, "not whole: final cannot be read" in audited.err) == (2, True)
    refused = perdure("verify", run)
    assert (refused.code, "its final checkpoint cannot be read" in refused.err) == (2, True)
    assert perdure("run", recipe, "--out", run, "--resume").code == 0
    assert (run / "checkpoints" / "final" / "state.safetensors").read_bytes() == before
    assert perdure("verify", run).code == 0
    (run / "metrics.jsonl").unlink()
    assert perdure("verify", run).code == 0


def test_audit_and_verify(perdure: Callable[..., Any], finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shown = perdure("audit", run)
    assert (shown.code, shown.err) == (0, "")
    for line in (
        "command     perdure run",
        "strategy replay, seed 0",
        "rows        stage-002:",
        "checkpoint  stage-001-step-00000004: step 4, ",
        "checkpoint  final: step 8, ",
        "state       finished",
    ):
        assert line in shown.out, shown.out
    second = [json.loads(line) for line in (run / "keys" / "stage-002.jsonl").read_text().splitlines()]
    replayed = next(row for row in second if row[3])
    assert replayed[0] == "ones"
    told = perdure("audit", run, "--key", replayed[1], "--key", "nobody").out
    assert f"{replayed[1]}: task ones, stage-001: trained on 1 times, replayed 0 times" in told
    assert f"{replayed[1]}: task ones, stage-002: trained on 0 times, replayed {replayed[3]} times" in told
    assert "nobody: no finished stage was trained on it" in told

    same = perdure("verify", run)
    assert (same.code, same.err) == (0, "")
    assert "trained again from stage-001-step-00000004; final state, model and scores are the same" in same.out
    with (run / "scores.csv").open("a") as file:
        file.write("\n")
    other = perdure("verify", run)
    assert (other.code, "scores.csv: " in other.err) == (1, True)

    early = run / "checkpoints" / "stage-001-step-00000004" / "state.safetensors"
    early.write_bytes(b"torn")
    assert "does not have the checksum" in perdure("audit", run).out


def test_a_finished_run_goes_on_extends_answers_and_reports(
    perdure: Callable[..., Any], finished_run: Path, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    again = perdure("run", recipe, "--out", run, "--resume")
    assert again.code == 0
    assert "finished; nothing to do" in again.out
    before = results(run)

    data = recipe.parent
    given = ("--task", data / "fives.jsonl", "--evaluation", data / "fives-held.jsonl")
    extended = perdure("extend", run, *given)
    assert (extended.code, extended.err) == (0, "")
    after = results(run)
    assert after["tasks"] == ["ones", "threes", "fives"]
    assert after["steps"] == 12
    old, new = (r["scores"]["loss"]["values"] for r in (before, after))
    assert [row[:2] for row in new[: len(old)]] == old
    command = shlex.join(["perdure", "extend", str(run), *map(str, given)])
    assert after["command"] == f"{before['command']} && {command}"
    assert "nothing is left to do" in perdure("extend", run, "--resume").out
    assert "has a task 'fives' already" in perdure("extend", run, *given).err

    scored = perdure("evaluate", run)
    assert (scored.code, scored.err) == (0, "")
    assert all(name in scored.out for name in ("ones", "threes", "fives", "general probe"))
    kept = json.loads((run / "evaluation.json").read_text())["scores"]["fives"]["loss"]
    assert kept == pytest.approx(new[-1][-1], rel=1e-6)
    own = perdure("evaluate", run, "--data", data / "ones-held.jsonl")
    assert (own.code, "is read as the run's task ones is" in own.out) == (0, True)
    found = json.loads((run / "evaluation-ones-held.json").read_text())
    assert found["scores"]["ones-held"]["loss"] == pytest.approx(new[-1][0], rel=1e-6)
    assert "error: --data nowhere.jsonl: no such file" in perdure("evaluate", run, "--data", "nowhere.jsonl").err

    answer = perdure("generate", run, "w1 w2 ", "--max-new-tokens", "3")
    assert (answer.code, answer.err) == (0, "")
    assert len(answer.out.split()) <= 3  # fewer where the model ends its answer
    nothing = perdure("generate", run, "")
    assert (nothing.code, "the prompt is empty" in nothing.err) == (2, True)

    page = perdure("report", run, finished_run, "--out", tmp_path / "both.html")
    assert page.code == 0
    assert (tmp_path / "both.html").is_file()


def test_a_soft_prompt_does_what_other_tunings_do(
    perdure: Callable[..., Any], recipe: Path, tmp_path: Path
) -> None:
    """Three embeddings of width 16 in float32: 192 bytes. The model has 64 positions, of which 61 are left."""
    run = tmp_path / "run"
    prompt = ("--set", "soft_prompt.tokens=3", "--set", "optimizer.lr=0.1")
    given = ("run", recipe, "--tuning", "soft-prompt", *prompt, "--out", run)
    done = perdure(*given)
    assert (done.code, done.err) == (0, "")
    assert "(soft-prompt): 48 of " in done.out
    assert (results(run)["tuning"], results(run)["parameters"]["trainable"]) == ("soft-prompt", 48)
    losses = results(run)["scores"]["loss"]["values"]
    assert losses[1][0] < losses[0][0]
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_size < 192 + 1000
    assert not (run / "model").exists()

    state = run / "checkpoints" / "final" / "state.safetensors"
    before = state.read_bytes()
    state.write_bytes(b"torn")
    assert perdure(*given, "--resume").code == 0
    assert state.read_bytes() == before
    other = perdure(*given, "--resume", "--set", "soft_prompt.tokens=4")
    assert (other.code, "soft_prompt.tokens: 3 there, 4 now" in other.err) == (2, True)

    assert perdure("evaluate", run).code == 0
    assert json.loads((run / "evaluation.json").read_text())["scores"]["ones"]["loss"] == losses[-1][0]
    answer = perdure("generate", run, "w1 w2 ", "--max-new-tokens", "3")
    assert (answer.code, answer.err) == (0, "")
    long = perdure("generate", run, "w1 " * 62)
    assert (long.code, "longer than the model takes (61 tokens)" in long.err) == (2, True)
    assert "(soft-prompt), strategy replay" in perdure("audit", run).out


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("tokens=57", "57 virtual tokens are too many for a model of 64 positions"),
        ("tokens=0", "soft_prompt.tokens: must be greater than or equal to 1, got 0"),
        ("init=text", "soft_prompt: init: text and a text go together, got init: text and text: None"),
        ("init=words", "soft_prompt.init: must be 'vocabulary', 'random' or 'text', got 'words'"),
    ],
)
def test_a_soft_prompt_that_cannot_be_is_refused(
    perdure: Callable[..., Any], recipe: Path, tmp_path: Path, setting: str, said: str
) -> None:
    given = ("--tuning", "soft-prompt", "--set", f"soft_prompt.{setting}", "--out", tmp_path / "run")
    refused = perdure("run", recipe, *given)
    assert (refused.code, said in refused.err, (tmp_path / "run").exists()) == (2, True, False), refused.err


def test_ctrl_c_saves_and_the_printed_command_ends_like_an_uninterrupted_run(
    perdure: Callable[..., Any], recipe: Path, tmp_path: Path
) -> None:
    given = ["run", str(recipe), "--set", "epochs=16", "--set", "log_every=1"]
    out = tmp_path / "stopped"
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "perdure.cli", *given, "--out", str(out)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        log = out / "metrics.jsonl"
        while process.poll() is None and time.monotonic() < deadline:
            if log.is_file() and log.read_text().count('"event": "step"') >= 10:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    stopped = int(err.split("stopped after step ")[1].split(",")[0])
    assert 10 <= stopped < 128
    assert any((out / "checkpoints").iterdir())
    assert not (out / "results.json").exists()
    program, *arguments = shlex.split(err.split("Go on with: ")[1])
    assert program == "perdure"
    assert arguments == [*given, "--out", str(out), "--resume"]

    assert "add --resume" in perdure(*given, "--out", out).err
    resumed = perdure(*arguments)
    assert (resumed.code, resumed.err) == (0, "")
    assert f"going on after step {stopped} of 128" in resumed.out
    assert perdure(*given, "--out", tmp_path / "straight").code == 0
    here, there = results(out), results(tmp_path / "straight")
    assert here["scores"] == there["scores"]
    assert here["probe"] == there["probe"]
    assert here["command"] == shlex.join(["perdure", *given, "--out", str(out)])


def test_a_run_is_made_again_from_its_own_config(
    perdure: Callable[..., Any], finished_run: Path, tmp_path: Path
) -> None:
    """Its recipe's relative paths still mean what they meant."""
    assert perdure("run", finished_run / "config.yaml", "--out", tmp_path / "again").code == 0
    assert results(tmp_path / "again")["scores"] == results(finished_run)["scores"]


def test_evaluate_generates_for_the_rows_that_the_run_generated_for(
    perdure: Callable[..., Any], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With generate_rows the model answers a choice of rows: another choice would give other scores."""
    from perdure.training.measure import Measure

    asked: list[list[list[int]]] = []

    def answers(self: Measure, prompts: Any, longest: int) -> list[str]:
        asked.append([prompt.x.tolist() for prompt in prompts])
        return [""] * len(prompts)

    monkeypatch.setattr(Measure, "answers", answers)
    out = tmp_path / "run"
    assert perdure("run", recipe, "--out", out, "--set", "evaluation.generate_rows=3").code == 0
    during, asked[:] = asked[-3:], []
    assert perdure("evaluate", out).code == 0
    assert asked == during
