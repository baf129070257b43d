"""`perdure arena` from the command line: on nano, and on a folder with Qwen2's architecture and a chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perdure.evaluation.intervals import wilson
from perdure.recipes.arena.options import Options, settings_of
from perdure.recipes.arena.results import phases, split, summarise

SMALL = ("--episodes", "6", "--eval-tasks", "10", "--eval-every", "3", "--set", "pool=10", "--set", "probe=false")


@pytest.fixture(scope="module")
def finished(perdure: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs on nano that differ by their seed."""
    path = tmp_path_factory.mktemp("arena")
    for seed in ("0", "1"):
        done = perdure("arena", *SMALL, "--seed", seed, "--out", str(path / f"seed{seed}"))
        assert done.code == 0, done.err
        assert "exact match" in done.out
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5-0.5B's config with two layers, random weights, a tokenizer trained on the arena and a template."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from perdure.streams.arena import KINDS, generate

    path = tmp_path_factory.mktemp("models") / "qwen2.5-0.5b"
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = [item.prompt + item.answer for kind in KINDS for item in generate(kind, 60, 5)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=marks, initial_alphabet=alphabet)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=896, intermediate_size=4864, num_hidden_layers=2,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-6,
        rope_theta=1000000.0, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def results_of(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "results.json").read_text()))


def test_a_run_leaves_results_curves_log_and_models(finished: Path) -> None:
    run = finished / "seed0"
    found = results_of(run)
    assert found["initial"] == found["history"][0]["exact_match"]
    assert found["final"] == found["history"][-1]["exact_match"]
    assert found["best"] == max(entry["exact_match"] for entry in found["history"])
    assert [entry["episode"] for entry in found["history"]] == [0, 3, 6]
    assert set(found["kinds"]) == set(found["tasks"])
    assert {kind["rows"] for kind in found["kinds"].values()} == {2}
    assert found["pretraining_wording"]["initial"]["exact_match"] > 0.5
    assert (run / "learning_curves.png").stat().st_size > 10_000
    assert (run / "checkpoint_ep00006" / "adapter_config.json").is_file()
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "episode" for event in events) == 6


def test_pool_and_held_out_problems_are_apart() -> None:
    from perdure.recipes.arena.command import problems
    from perdure.streams.arena import check_disjoint

    pool, held_out = problems(settings_of(Options(eval_tasks=50, levels="1-5"), ["pool=400"]))
    check_disjoint(pool, held_out, apart=True)
    assert (len(pool), len(held_out)) == (400, 50)
    assert {item.level for item in held_out} == {1, 2, 3, 4, 5}
    _, others = problems(settings_of(Options(eval_tasks=50, levels="1-5"), ["pool=100"]))
    assert [item.key for item in others] == [item.key for item in held_out], "whatever the pool"


def test_a_finished_run_is_left_alone_and_another_needs_another_folder(
    perdure: Callable[..., Any], finished: Path
) -> None:
    command = ("arena", *SMALL, "--seed", "0", "--out", str(finished / "seed0"))
    again = perdure(*command, "--resume")
    assert again.code == 0
    assert "nothing to do" in again.out
    refused = perdure(*command)
    assert refused.code == 2
    assert "add --resume" in refused.err


def test_runs_are_compared(perdure: Callable[..., Any], finished: Path, tmp_path: Path) -> None:
    done = perdure("arena", "compare", str(finished), "--out", str(tmp_path))
    assert done.code == 0, done.err
    for name in ("complete_comparison.png", "results_table.png", "RESULTS_SUMMARY.md"):
        assert (tmp_path / name).stat().st_size > 500
    empty = tmp_path / "empty"
    empty.mkdir()
    refused = perdure("arena", "compare", str(empty))
    assert refused.code == 2
    assert str(empty) in refused.err
    before = perdure("arena", "--episodes", "3", "compare", str(finished))
    assert before.code == 2
    assert "--episodes: stands before compare" in " ".join(before.err.split())


def test_other_commands_on_an_arena_run(perdure: Callable[..., Any], finished: Path) -> None:
    """Its model answers as its last episode left it; what reads other runs says where to go."""
    run = finished / "seed0"
    done = perdure("generate", str(run), "6 7 8 9", "--max-new-tokens", "3")
    assert done.code == 0, done.err
    assert done.out.strip()
    for command in ("report", "evaluate", "verify"):
        refused = perdure(command, str(run))
        assert refused.code == 2
        assert f"perdure arena compare {run}" in refused.err


def test_problems_are_printed(perdure: Callable[..., Any]) -> None:
    done = perdure("arena", "tasks", "-n", "1", "--kind", "grid", "--level", "4")
    assert done.code == 0
    assert "grid" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fp16", "--bf16"), "choose one"),
        (("--strategy", "ewc"), "--task-every N"),
        (("--model", "missing/folder/here"), "missing/folder/here"),
        (("--kinds", "chess"), "chess"),
        (("--set", "online.episodse=3"), "online.episodse"),
        (("--method", "full", "--lora-r", "4"), "--lora-r"),
        (("--soft-tokens", "4"), "--soft-tokens"),
        (("--task-every", "2"), "nothing takes note of a task's end"),
        (("--task-every", "50", "--strategy", "ewc"), "no task ends within"),
        (("--kinds", "math", "--drift", "blocks"), "there is one alone"),
        (("--levels", "2", "--curriculum", "easy-first"), "there is one alone"),
        (("--method", "maml", "--fp16"), "fp16"),
        (("--method", "reptile", "--window", "3"), "a loop of its own"),
        (("--kinds", "operator", "--levels", "1", "--eval-tasks", "100"), "--eval-tasks"),
    ],
    ids=str,
)
def test_mistakes_are_answered_in_words(
    perdure: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = perdure("arena", *SMALL, *arguments, "--out", str(tmp_path / "run"))
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "run").exists(), "nothing is left of a run that never began"


def test_it_runs_on_qwen2_through_its_chat_template(
    perdure: Callable[..., Any], qwen: Path, tmp_path: Path
) -> None:
    small = (
        "--episodes",
        "2",
        "--eval-tasks",
        "2",
        "--kinds",
        "math,grid",
        "--set",
        "pool=2",
        "--set",
        "probe=false",
    )
    done = perdure("arena", "--model", str(qwen), *small, "--bf16", "--out", str(tmp_path / "run"))
    assert done.code == 0, done.err
    found = results_of(tmp_path / "run")
    assert found["pretraining_wording"] is None
    assert found["history"][-1]["loss"] < found["history"][0]["loss"]
    from perdure.recipes.serve import _asked, serve
    from perdure.training.display import Display

    served = serve(tmp_path / "run", Display())
    asked = served.measure.encoder.tokenizer.decode(_asked(served, "2 + 2", None).x)
    assert asked == "<|im_start|>user\n2 + 2<|im_end|>\n<|im_start|>assistant\n", "asked as it was trained"


def test_the_defaults_are_those_of_the_model() -> None:
    qwen = settings_of(Options(model="Qwen/Qwen2.5-0.5B-Instruct"), [])
    assert (qwen.optimizer.lr, qwen.online.episodes, qwen.eval_tasks, qwen.method) == (1e-4, 80, 30, "lora")
    assert (qwen.lora.r, qwen.lora.alpha, qwen.optimizer.weight_decay, qwen.clip) == (16, 32, 0.01, 1.0)
    lfm = settings_of(Options(model="LiquidAI/LFM2-350M-Math"), [])
    assert (lfm.optimizer.lr, lfm.precision, lfm.online.episodes, lfm.eval_tasks) == (5e-5, "fp16", 60, 25)
    tiny = settings_of(Options(model="TinyLlama/TinyLlama-1.1B-Chat-v1.0"), [])
    assert (tiny.method, tiny.optimizer.lr, tiny.soft_prompt.tokens, tiny.online.episodes) == (
        "soft-prompt",
        1e-3,
        8,
        60,
    )
    nano = settings_of(Options(), [])
    assert (nano.model, nano.eval_tasks, nano.method) == ("nano", 500, "lora")


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634)]
)
def test_wilson_s_interval(right: int, count: int, low: float, high: float) -> None:
    """The ends solve (p̂ − p)² = z²·p(1 − p)/n: for p̂ = 0 the upper is z²/(n + z²) = 3.8415/13.8415 = 0.2775."""
    assert wilson(right, count) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    z2 = 1.959963984540054**2
    for p in wilson(right, count):
        assert (right / count - p) ** 2 == pytest.approx(z2 * p * (1 - p) / count, abs=1e-12)


# Ten rows of one kind in three readings before, and as asked after: five were right in some reading (0 to 4). Of
# the six that are right at the end 1 and 2 were known in another reading, 5, 6 and 7 in none; 0 stayed right;
# 4 was right as asked and is lost.
BEFORE = {"k": {"exact": "1000100000", "stated": "1100000000", "plain": "1111000000"}}
AFTER = {"k": {"exact": "1110011100", "stated": "1110011100", "plain": "0000000000"}}
SPLIT = {"known": 0.5, "elicited": 0.2, "learnt": 0.3, "lost": 0.1}


def check_split(parted: Callable[[Any, Any], dict[str, float]]) -> None:
    found = parted(BEFORE, AFTER)
    assert found == pytest.approx(SPLIT)
    assert found["elicited"] + found["learnt"] - found["lost"] == pytest.approx(0.6 - 0.2)
    # A kind that has no wording of pretraining, beside one that has: shares are of the rows of both.
    bare = ({"exact": "0000110000", "stated": "1110110000"}, {"exact": "0000100001", "stated": "0000000001"})
    both = parted({**BEFORE, "b": bare[0]}, {**AFTER, "b": bare[1]})
    assert both == pytest.approx({"known": 0.5, "elicited": 0.1, "learnt": 0.2, "lost": 0.1})


def test_a_gain_parted_by_hand() -> None:
    check_split(split)


def by_rates(before: Any, after: Any) -> dict[str, float]:
    """As it once was: the best reading's rate, and not its rows."""
    rate = {reading: marks.count("1") / 10 for reading, marks in before["k"].items()}
    final, known = after["k"]["exact"].count("1") / 10, max(rate.values())
    return {
        "known": known,
        "elicited": min(final, known) - rate["exact"],
        "learnt": final - known,
        "lost": 0.0,
    }


def without_stated(before: Any, after: Any) -> dict[str, float]:
    return split({kind: {**marks, "stated": marks["exact"]} for kind, marks in before.items()}, after)


def by_the_readings_after(before: Any, after: Any) -> dict[str, float]:
    return split({kind: {**after[kind], "exact": marks["exact"]} for kind, marks in before.items()}, after)


@pytest.mark.parametrize("wrong", [by_rates, without_stated, by_the_readings_after])
def test_a_gain_parted_wrongly_is_caught(wrong: Callable[[Any, Any], dict[str, float]]) -> None:
    with pytest.raises(AssertionError):
        check_split(wrong)


def entry(episode: int, score: float) -> dict[str, Any]:
    return {"episode": episode, "exact_match": score}


def test_phases_follow_the_rise() -> None:
    """A rise of 0.8: half of it is there at 20, nine tenths (0.72) at 40; the best is at 50, and it ends at 60."""
    scores = [0.0, 0.1, 0.4, 0.6, 0.75, 0.8, 0.7]
    found = phases([entry(10 * i, score) for i, score in enumerate(scores)])
    assert [(p["name"], p["from"], p["to"]) for p in found] == [
        ("rapid learning", 0, 20),
        ("steady gains", 20, 40),
        ("stable", 40, 60),
    ]
    assert [round(p["gain"], 2) for p in found] == [0.4, 0.35, -0.05]
    assert [p["name"] for p in phases([entry(0, 0.5), entry(10, 0.4)])] == ["stable"]


def test_the_best_is_the_earliest_of_equals() -> None:
    history = [
        {
            "episode": e, "exact_match": score, "interval": [0, 1], "stated": score, "plain": None, "kinds": {},
            "stated_kinds": {}, "rows_of": {}, "probe": None, "inferred": None, "adapted": None, "rouge_l": None,
            "readings": {"math": {"exact": "0"}},
        }
        for e, score in ((0, 0.1), (10, 0.9), (20, 0.9), (30, 0.2))
    ]  # fmt: skip
    found = summarise(history)
    assert (found["initial"], found["final"], found["best"], found["best_episode"]) == (0.1, 0.2, 0.9, 10)
