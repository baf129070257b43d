"""Online streams on nano: what is written, stopping and going on to the same bytes, tasks, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from perdure.errors import ConfigError, RunError
from perdure.recipes.arena.command import make_plan
from perdure.recipes.arena.options import Options, settings_of
from perdure.training import checkpoint
from perdure.training.display import Display
from perdure.training.folder import RunFolder
from perdure.training.interrupt import Interrupted, StopRequest
from perdure.training.online import PREFIX, STATE, Online, OnlinePlan, online_facts
from perdure.types import Task

SMALL = ("pool=15", "probe=false", "online.checkpoint_every=2")


def plan(overrides: Sequence[str] = (), **options: Any) -> OnlinePlan:
    chosen = {"episodes": 6, "eval_tasks": 5, "eval_every": 3, **options}
    return make_plan(settings_of(Options(**chosen), [*SMALL, *overrides]), Display(), "perdure arena")


def run(path: Path, overrides: Sequence[str] = (), **options: Any) -> Online:
    online = Online(plan(overrides, **options), RunFolder(path), again="perdure arena")
    online.execute()
    return online


class StopAfter(StopRequest):
    """Stops a run once so many episodes are done."""

    def __init__(self, online: Online, episodes: int) -> None:
        super().__init__()
        self._online, self._episodes = online, episodes

    def __bool__(self) -> bool:
        return self._online.plan.episodes.done >= self._episodes


def stopped(path: Path, after: int, overrides: Sequence[str] = (), **options: Any) -> None:
    online = Online(plan(overrides, **options), RunFolder(path), again="perdure arena")
    with pytest.raises(Interrupted, match=f"after episode {after}"):
        online._execute(StopAfter(online, after))
    assert online._log is not None
    online._log.close()


def lines(path: Path, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found if line["event"] == event]


def outcome(path: Path) -> dict[str, Any]:
    """All bytes of the checkpoints that are kept, and the log without times and without marks."""
    files = sorted(file for file in path.glob(f"{PREFIX}*/**/*") if file.is_file() and file.name != "README.md")
    return {
        "files": {str(file.relative_to(path)): file.read_bytes() for file in files},
        "log": lines(path, "episode") + lines(path, "evaluation"),
    }


STREAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "replay": {"replay": "reservoir", "memory": "4", "learn_on": "errors", "window": 2, "passes": 2},
    "blocks": {"drift": "blocks", "strategy": "ewc", "kinds": "math,grid", "curriculum": "competence"},
    "tasks": {"task_every": 2, "strategy": "ema", "drift": "gradual", "curriculum": "easy-first"},
    "reptile": {"method": "reptile", "overrides": ["meta.shots=2", "meta.inner_steps=2"]},
    "maml": {"method": "maml", "overrides": ["meta.shots=2", "meta.inner_steps=2"]},
    "multi-lora": {"method": "multi-lora", "replay": "ring", "memory": "6", "kinds": "math,grid"},
    "policy": {"method": "soft-prompt", "replay": "loss_descending", "memory": "4"},
    "derpp": {"strategy": "derpp", "overrides": ["continual_strategy={derpp: {offer: step}}", "lora.dropout=0.1"]},
}


@pytest.mark.parametrize("name", STREAMS)
def test_stopped_and_gone_on_it_ends_with_the_same_bytes(tmp_path: Path, name: str) -> None:
    run(tmp_path / "whole", **STREAMS[name])
    stopped(tmp_path / "parts", 3, **STREAMS[name])
    stopped(tmp_path / "parts", 5, **STREAMS[name])
    again = run(tmp_path / "parts", **STREAMS[name])
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    assert len(again.history) == 3


def test_killed_it_takes_the_episodes_since_its_newest_checkpoint_again(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    newest = tmp_path / "killed" / f"{PREFIX}00006"
    shutil.rmtree(newest)
    shutil.copytree(tmp_path / "killed" / f"{PREFIX}00004", tmp_path / "killed" / f".{PREFIX}00006.partial")
    run(tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert [entry["episode"] for entry in whole.history] == [0, 3, 6]


def test_an_unreadable_checkpoint_is_passed_over(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    file = tmp_path / "torn" / f"{PREFIX}00006" / STATE / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    run(tmp_path / "torn")
    assert outcome(tmp_path / "torn") == outcome(tmp_path / "whole")


def test_a_checkpoint_is_a_model_that_peft_loads(tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    from perdure.models.load import load

    online = run(tmp_path / "run")
    loaded = PeftModel.from_pretrained(load("nano").model, str(tmp_path / "run" / f"{PREFIX}00006"))
    ids = torch.tensor([[5, 80, 90, 200]])
    online.plan.learner.model.eval()
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, online.plan.learner.model(ids).logits, atol=1e-6)


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    online = Online(plan(episodes=10, eval_every=2), RunFolder(tmp_path / "run"))
    scores = iter([0.0, 0.2, 0.9, 0.5, 0.9, 0.1])
    real = online.plan.exam

    class Fixed:
        def __call__(self, episode: int) -> dict[str, Any]:
            return {**real(episode), "exact_match": next(scores)}

    object.__setattr__(online.plan, "exam", Fixed())
    online.execute()
    kept = sorted(path.name for path in (tmp_path / "run").glob(f"{PREFIX}*"))
    assert kept == [f"{PREFIX}0000{4}", f"{PREFIX}0000{8}", f"{PREFIX}000{10}"]
    assert online.best["episode"] == 4


def test_a_torn_checkpoint_does_not_hide_later_ones(tmp_path: Path) -> None:
    run(tmp_path / "run")
    file = tmp_path / "run" / f"{PREFIX}00006" / STATE / "state.safetensors"
    file.write_bytes(b"")
    stopped(tmp_path / "run", 5)
    assert sorted(path.name for path in (tmp_path / "run").glob(f"{PREFIX}*"))[-1] == f"{PREFIX}00005"


def test_it_learns_on_errors_alone_where_it_is_told_to(tmp_path: Path) -> None:
    run(tmp_path / "run", learn_on="errors", kinds="causal", episodes=8, overrides=["answers=short"])
    told = lines(tmp_path / "run", "episode")
    assert [line["learnt"] for line in told] == [not line["right_before"] for line in told]
    assert all((line["loss"] is None) == line["right_before"] for line in told)
    facts = online_facts(tmp_path / "run" / "metrics.jsonl")
    assert facts["learnt_on"] == sum(line["learnt"] for line in told)
    assert facts["right_before"] == sum(line["right_before"] for line in told) / 8


def test_tasks_end_where_they_should_and_show_the_rows_that_were_learnt(tmp_path: Path) -> None:
    online = Online(
        plan(task_every=2, strategy="ewc", kinds="math,grid", drift="blocks"), RunFolder(tmp_path / "run")
    )
    begun: list[tuple[str, int, set[str]]] = []
    ended: list[list[str]] = []
    learner = online.plan.learner
    begin, end = learner.begin_task, learner.end_task

    def see_begin(task: Task, index: int, total: int | None = None, resuming: bool = False) -> None:
        begun.append((task.name, index, {row.task for row in task.train}))
        begin(task, index, total, resuming)

    def see_end(rows: Any = None) -> None:
        ended.append([row.key for row in rows])
        end(rows)

    learner.begin_task, learner.end_task = see_begin, see_end  # type: ignore[method-assign]
    online.execute()
    keys = [line["key"] for line in lines(tmp_path / "run", "episode")]
    assert ended == [keys[:2], keys[2:3], keys[3:4], keys[4:6]], "after every second episode, and after each block"
    assert [kinds for _, _, kinds in begun] == [{"math"}, {"math"}, {"grid"}, {"grid"}]
    assert [index for _, index, _ in begun] == [0, 1, 2, 3]


@pytest.mark.parametrize(("boundary", "horizons"), [("reset", [4, 2, 2, 4]), ("continue", [12, 12, 12, 12])])
def test_a_schedule_s_horizon_is_the_task_s_where_it_begins_anew(
    tmp_path: Path, boundary: str, horizons: list[int]
) -> None:
    """Two passes over tasks of 2, 1, 1 and 2 episodes: the rate of a linear schedule falls to 0 over each."""
    online = Online(
        plan(
            [f"schedule={{type: linear, at_boundary: {boundary}}}"],
            task_every=2, strategy="ewc", kinds="math,grid", drift="blocks", passes=2,
        ),
        RunFolder(tmp_path / "run"),
    )  # fmt: skip
    found: list[int | None] = []
    begin = online.plan.learner.begin_task

    def see(task: Task, index: int, total: int | None = None, resuming: bool = False) -> None:
        found.append(total)
        begin(task, index, total, resuming)

    online.plan.learner.begin_task = see  # type: ignore[method-assign]
    online.execute()
    assert found == horizons


def test_other_versions_are_told_and_kept(tmp_path: Path, stream: Callable[[Path], None]) -> None:
    stream(tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(re.sub(r"torch: \S+", "torch: 1.0.0", config.read_text()))
    said: list[str] = []
    display = Display()
    display.say = said.append  # type: ignore[method-assign]
    online = Online(plan(), RunFolder(tmp_path / "run"), display, again="perdure arena")
    online.execute()
    assert [line for line in said if "torch" in line and line.startswith("warning: versions")]
    [change] = RunFolder(tmp_path / "run").recorded()["changes"]
    assert (change["episode"], "1.0.0" in change["changed"]) == (2, True)


def test_a_pool_is_no_larger_than_its_levels_allow() -> None:
    said: list[str] = []
    display = Display()
    display.say = said.append  # type: ignore[method-assign]
    asked = Options(episodes=2, eval_tasks=10, kinds="operator", levels="1")
    made = make_plan(settings_of(asked, ["pool=400", "probe=false"]), display)
    assert 0 < len(made.episodes.rows) < 48
    assert any("operator" in line and "in place of 400" in line for line in said)


@pytest.mark.parametrize("strategy", ["ewc", "lwf+replay"])
def test_a_strategy_that_needs_an_end_is_refused_where_there_is_none(strategy: str) -> None:
    with pytest.raises(ConfigError, match="--task-every N"):
        plan(strategy=strategy)


def test_a_part_for_each_task_needs_a_task_for_each_kind() -> None:
    with pytest.raises(ConfigError, match="only --drift blocks, without --task-every"):
        plan(strategy="pnn", task_every=2)


def test_a_strategy_of_several_phases_is_refused() -> None:
    with pytest.raises(ConfigError, match="several phases"):
        plan(strategy="packnet", drift="blocks")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lorra"}, "unknown method 'lorra'"),
        ({"replay": "reservior"}, "--replay: unknown memory or policy 'reservior'"),
        ({"memory": "5"}, "say --replay too"),
        ({"method": "reptile", "replay": "ring"}, "has a loop of its own"),
        ({"method": "maml", "window": 3}, "loop of its own"),
        ({"overrides": ["method=multi-lora"]}, "go together"),
        ({"levels": "1-9"}, "levels"),
        ({"levels": "hard"}, "write them as in 1-3"),
        ({"kinds": "maths"}, "unknown arena kind 'maths'"),
        ({"strategy": "joint"}, "one order"),
        ({"drift": "sudden"}, "online.drift"),
        ({"eval_tasks": 3}, "eval_tasks: at least one for each of 5 kinds"),
        ({"kinds": "operator", "levels": "1", "eval_tasks": 200}, "cannot supply"),
    ],
    ids=str,
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**options)


@pytest.mark.parametrize("change", [{"seed": 1}, {"lr": 0.5}, {"window": 3}, {"eval_tasks": 10}], ids=str)
def test_another_stream_cannot_be_gone_on_with(
    tmp_path: Path, change: dict[str, Any], stream: Callable[[Path], None]
) -> None:
    stream(tmp_path / "run")
    with pytest.raises(RunError, match="started otherwise"):
        run(tmp_path / "run", **change)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Copies a stream that was stopped after two episodes."""
    source = tmp_path_factory.mktemp("stream") / "run"
    stopped(source, 2)

    def copy(path: Path) -> None:
        shutil.copytree(source, path)

    return copy


def test_the_state_matters(tmp_path: Path, stream: Callable[[Path], None]) -> None:
    """The check of equal bytes can fail: with a window forgotten, the run ends otherwise."""
    for name in ("whole", "without"):
        stopped(tmp_path / name, 3, window=3)
    place = tmp_path / "without" / f"{PREFIX}00003"
    state = checkpoint.load(place / STATE)
    checkpoint.save(place / STATE, {**state, "updates": {"window": []}})
    for name in ("whole", "without"):
        run(tmp_path / name, window=3)
    assert outcome(tmp_path / "whole") != outcome(tmp_path / "without")
