"""Checkpoints: killed at any step and resumed, a training ends with the same bytes; what is torn is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from perdure.errors import NewerFormatError, RunError
from perdure.jax import Position, checkpoint, train
from perdure.jax.tree import named


def state(learner: Any) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in named(learner.state).items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "replay", "gradient": "separate", "at_boundary": "continue"},
        {"strategy": "ewc", "optimizer": "adafactor"},
    ],
    ids=["replay", "ewc"],
)
def test_resumed_at_any_step(changes: Any, make_learner: Any, make_tasks: Any, tmp_path: Path) -> None:
    """Three tasks of two epochs of two batches: taken up after each of the 12 steps, and to the end from there."""
    tasks = make_tasks(3)
    learner = make_learner(tuning="head", **changes)
    losses = []
    for step, (position, result) in enumerate(train(learner, tasks)):
        losses.append(result.loss)
        learner.save(tmp_path / str(step), position, tasks)
    whole = state(learner)
    assert len(losses) == 12
    for step in range(12):
        again = make_learner(tuning="head", **changes)
        start = again.load(tmp_path / str(step), tasks)
        rest = [result.loss for _, result in train(again, tasks, start)]
        assert rest == losses[step + 1 :]
        assert state(again) == whole


def test_without_the_state_it_ends_elsewhere(make_learner: Any, make_tasks: Any, tmp_path: Path) -> None:
    tasks = make_tasks(2)
    learner = make_learner(tuning="head", strategy="sequential")
    steps = train(learner, tasks)
    position, _ = next(steps)
    learner.save(tmp_path / "a", position, tasks)
    for _ in steps:
        pass
    whole = state(learner)
    for spoil in ("optimizer", "trained", "steps"):
        again = make_learner(tuning="head", strategy="sequential")
        fresh = again.state
        start = again.load(tmp_path / "a", tasks)
        if spoil == "steps":
            again.steps = 0
        else:
            parts = {name: getattr(again.state, name) for name in ("trained", "optimizer", "anchors")}
            again.state = type(fresh)(**{**parts, spoil: getattr(fresh, spoil)})
        for _ in train(again, tasks, start):
            pass
        assert state(again) != whole


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": jnp.array(1.5, jnp.bfloat16),
        "c": np.array([1, -2], np.int32),
        "d": np.zeros((0, 3), np.float32),
    }
    checkpoint.save(tmp_path / "c", arrays, {"x": [1, None]})
    found, plain = checkpoint.load(tmp_path / "c")
    assert plain == {"x": [1, None]}
    assert {n: (v.dtype, v.shape, v.tobytes()) for n, v in found.items()} == {
        n: (np.asarray(v).dtype, v.shape, np.asarray(v).tobytes()) for n, v in arrays.items()
    }
    from safetensors.numpy import load_file

    assert np.array_equal(load_file(tmp_path / "c" / "state.safetensors")["c"], [1, -2])


def test_what_is_torn_or_other_is_refused(make_learner: Any, make_tasks: Any, tmp_path: Path) -> None:
    tasks = make_tasks(1)
    learner = make_learner(tuning="head", strategy="sequential")
    learner.save(good := tmp_path / "good", Position(0, 0, 1), tasks)
    with pytest.raises(RunError, match=r"was made with other settings \(lr: 0.01 then, 0.5 now\)"):
        make_learner(tuning="head", strategy="sequential", lr=0.5).load(good, tasks)
    with pytest.raises(RunError, match="was made with other tasks or rows"):
        learner.load(good, make_tasks(1, seed=1))
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    record = json.loads((bad / "state.json").read_text())
    for change, words in (({"format": 99}, "newer"), ({"state": {}}, "state.json does not have the checksum")):
        (bad / "state.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(RunError, match=words) as caught:
            learner.load(bad, tasks)
        assert isinstance(caught.value, NewerFormatError) == ("format" in change)
    (bad / "state.json").write_text(json.dumps(record))
    content = bytearray((bad / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (bad / "state.safetensors").write_bytes(content)
    with pytest.raises(RunError, match="does not have the checksum"):
        learner.load(bad, tasks)
    with pytest.raises(RunError, match="not a readable checkpoint"):
        learner.load(tmp_path / "none", tasks)
    checkpoint.save(tmp_path / "other", {}, {})
    with pytest.raises(RunError, match="not a checkpoint of this training"):
        learner.load(tmp_path / "other", tasks)
    fewer = {name: value for name, value in named(learner.state).items() if "pool" not in name}
    checkpoint.save(tmp_path / "fewer", fewer, record["state"])
    with pytest.raises(RunError, match="its weights are not those of this model"):
        learner.load(tmp_path / "fewer", tasks)
