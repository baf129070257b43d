"""A handful of `make torture`, and proof that its comparison can fail."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.torture import command_of, counting, digest, raised, run, write_recipe
from perdure.memory import BalancedBuffer
from perdure.models.load import NANO
from perdure.strategies import EWC, Replay
from perdure.training.learner import Learner

SMALL = {
    "stream": {"arena": {"kinds": ["math", "grid"], "train_rows": 16, "evaluation_rows": 4}},
    "checkpoint_every": 1,
    "evaluation": {"generate_rows": 2},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Changes to the benchmark's recipe: a network of a few thousand weights and nano's tokenizer; less of all.

    What takes time is the code that is stopped anywhere, and it is the same.
    """
    import torch
    import transformers

    path = tmp_path_factory.mktemp("small")
    tokenizer = transformers.AutoTokenizer.from_pretrained(NANO)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    (path / "probe.jsonl").write_text('{"prompt": "1 + 1 = ", "answer": "2"}\n')
    probe = {"name": "probe", "train": str(path / "probe.jsonl")}
    return {**SMALL, "model": str(path / "model"), "probe": probe}


@pytest.mark.parametrize(
    ("strategy", "tuning"), [("replay+ewc", "full"), ("replay", "lora"), ("lwf+agem", "soft-prompt")]
)
def test_killed_at_random_moments_a_run_ends_with_the_same_bytes(
    strategy: str, tuning: str, small: dict[str, Any], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", strategy, tuning, **small)
    with counting(None) as calls:
        run(recipe, tmp_path / "undisturbed")
    expected = digest(tmp_path / "undisturbed")
    draw = random.Random(f"{strategy}/{tuning}")
    for _ in range(2):
        how = raised(recipe, tmp_path / "run", calls[0], draw)
        assert digest(tmp_path / "run") == expected, how


def test_killed_by_the_system_a_run_ends_with_the_same_bytes(
    stopped: Path, perdure: Callable[..., Any], undrawn: None, tmp_path: Path
) -> None:
    """SIGKILL to a process that has taken steps; the command line goes on with what it left."""
    recipe, out = stopped / "recipe.yaml", tmp_path / "run"
    command = command_of(recipe, out)
    log = out / "metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.is_file() and '"event": "step"' in log.read_text():
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = perdure(*command[command.index("run") :])
    assert done.code == 0, done.err
    assert digest(out) == digest(stopped / "undisturbed")


def _nothing(self: Any, state: Mapping[str, Any]) -> None:
    del self, state


def _without_generators(self: Learner, state: Mapping[str, Any]) -> None:
    import torch

    whole(self, state)
    torch.manual_seed(99)
    self.rng.manual_seed(99)


whole = Learner.load_state_dict


@pytest.fixture(scope="module")
def stopped(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, a run that was never disturbed, and one that was stopped within its second task."""
    path = tmp_path_factory.mktemp("stopped")
    recipe = write_recipe(path / "recipe.yaml", "replay+ewc", "lora", **small)
    run(recipe, path / "undisturbed")

    class Stopped(BaseException):
        pass

    steps = []
    step = Learner.step

    def stopping(self: Learner, examples: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:  # within the second task: memory and importance are filled
            raise Stopped
        return step(self, examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", stopping)
        with pytest.raises(Stopped):
            run(recipe, path / "run")
    return path


def test_with_the_whole_state_a_copy_ends_with_the_same_bytes(stopped: Path, tmp_path: Path) -> None:
    """What the copies below lose is their state alone, and no place on the disk."""
    path = shutil.copytree(stopped / "run", tmp_path / "run")
    run(stopped / "recipe.yaml", path)
    assert digest(path) == digest(stopped / "undisturbed")


@pytest.mark.parametrize(
    ("owner", "broken"),
    [(EWC, _nothing), (Replay, _nothing), (BalancedBuffer, _nothing), (Learner, _without_generators)],
    ids=["strategy", "memory and counts", "memory", "generators"],
)
def test_without_a_part_of_the_state_the_bytes_differ(
    owner: Any, broken: Any, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA has dropout, which draws from torch's generator; the true Fisher draws from the strategy's."""
    path = shutil.copytree(stopped / "run", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(owner, "load_state_dict", broken)
        run(stopped / "recipe.yaml", path)
    assert digest(path) != digest(stopped / "undisturbed")
