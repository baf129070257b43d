"""`perdure mix` on the default model's architecture with two layers: files, figures, phase A once, every option."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("undrawn")

METHODS = ("none", "difficulty_hard", "loss_descending")


@pytest.fixture(scope="module")
def tinyllama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TinyLlama's config, its sizes divided, with two layers and random weights, and nano's tokenizer."""
    import transformers

    from perdure.models.load import NANO

    path = tmp_path_factory.mktemp("models") / "tinyllama"
    tokenizer = transformers.AutoTokenizer.from_pretrained(NANO)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=176, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=1, max_position_embeddings=2048, rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 rows with MATH's columns, 30 with HotpotQA's, and two files of somebody's own."""
    path = tmp_path_factory.mktemp("data")

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(
        "math.jsonl",
        [
            {
                "problem": f"What is {i} plus {i % 7}?",
                "solution": f"{'So we add. ' * (i % 4)}It is $\\boxed{{{i + i % 7}}}$.",
                "level": f"Level {1 + i % 5}" if i else "Level ?",
                "type": "Algebra" if i % 2 else "Geometry",
            }
            for i in range(30)
        ],
    )
    write(
        "hotpot.jsonl",
        [
            {
                "id": f"h{i}",
                "question": f"Where is tower {i}?",
                "answer": f"in town {i % 6}",
                "context": [[f"Tower {i}", [f"It is in town {i % 6}.", "It is tall."]], ["River", ["It is long."]]],
                "supporting_facts": [[f"Tower {i}", 0]],
            }
            for i in range(30)
        ],
    )
    for name, word in (("first", "red"), ("second", "blue")):
        write(
            f"{name}.jsonl", [{"prompt": f"{word} {i} is", "answer": f" {i % 3}", "hops": i % 4} for i in range(30)]
        )
    return path


@pytest.fixture(scope="module")
def mixed(
    perdure: Callable[..., Any], tinyllama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Three selections with the default settings but sizes; what was printed is in printed.txt."""
    out = tmp_path_factory.mktemp("mix") / "out"
    done = perdure("mix", "--selection-method", ",".join(METHODS), *default(tinyllama, data), "--out", out)
    assert (done.code, done.err) == (0, "")
    (out / "printed.txt").write_text(done.out)
    return out


def default(model: Path, data: Path) -> list[str]:
    return [
        "--model", str(model), "--task-a", str(data / "math.jsonl"), "--task-b", str(data / "hotpot.jsonl"),
        "--n-train", "20", "--n-val", "4", "--batch-size", "8", "--eval-every", "2", "--workers", "1",
        "--lr", "1e-2",
    ]  # fmt: skip


def history(out: Path, slug: str, names: str = "MATH_to_HotpotQA") -> dict[str, Any]:
    return dict(json.loads((out / f"forgetting_history_{names}_{slug}.json").read_text()))


def test_what_is_written(mixed: Path) -> None:
    """20 rows in batches of 8 are 3 steps an epoch, in two epochs; measured at 0, 2, 4 and the end."""
    for method, share in zip(METHODS, ("0pct", "10pct", "10pct"), strict=True):
        found = history(mixed, f"{method}_{share}_bf16")
        assert found["selection_method"] == method
        assert found["steps"] == [0, 2, 4, 6]
        assert len(found["math_loss"]) == len(found["hotpot_loss"]) == 4
        assert found["math_loss"][0] == history(mixed, "none_0pct_bf16")["math_loss"][0]
        assert found["replayed_rows"] == (0 if method == "none" else 4)  # a tenth of 20 is 2, in each epoch
        assert (mixed / f"sequential_forgetting_curve_MATH_to_HotpotQA_{method}_{share}_bf16.png").stat().st_size
        assert (mixed / "runs" / f"{method}_{share}_bf16" / "report.html").is_file()
    for name in ("forgetting_history_plot.png", "report.html", "results.md", "results.json"):
        assert (mixed / name).is_file()
    rows = json.loads((mixed / "results.json").read_text())["rows"]
    assert [row["replayed_rows"] for row in rows] == [0, 4, 4]
    assert len({row["first_loss_before"] for row in rows}) == 1
    assert len({row["first_loss"] for row in rows}) == 3
    assert all(row["second_loss"] < row["second_loss_before"] for row in rows)
    assert "F1" in (mixed / "results.md").read_text()
    printed = (mixed / "printed.txt").read_text()
    assert printed.count("phase A:") == 1
    assert "questions stand behind all paragraphs" in printed


def test_the_settings_are_the_seeds(mixed: Path) -> None:
    from perdure.training.folder import RunFolder

    settings = RunFolder(mixed / "runs" / "difficulty_hard_10pct_bf16").settings()
    assert (settings.lora.r, settings.lora.alpha, settings.lora.dropout) == (8, 16, 0.05)
    assert (settings.precision, settings.max_length, settings.seed) == ("bf16", 2048, 42)
    replay = settings.continual_strategy["replay"]
    assert replay == {"select": "difficulty_hard", "ratio": "once", "field": "level", "capacity": 2}


def test_the_adapter_of_phase_a_loads_in_peft(mixed: Path, tinyllama: Path) -> None:
    import transformers
    from peft import PeftModel

    (home,) = mixed.glob("math_adapter_tinyllama_bf16_*")
    model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tinyllama), home)
    assert any(float(p.detach().abs().sum()) for name, p in model.named_parameters() if "lora_B" in name)


def test_the_hardest_and_the_worst_are_chosen(mixed: Path) -> None:
    """The two rows that were replayed, from what the run wrote down, against a sort by hand."""
    (home,) = mixed.glob("math_adapter_*")
    losses = json.loads((home / "math_losses_20_samples.json").read_text())["losses"]
    assert len(losses) == 20
    worst = sorted(losses, key=losses.__getitem__)[-2:]
    assert set(replayed(mixed / "runs" / "loss_descending_10pct_bf16")) == set(worst)
    for counts in replayed(mixed / "runs" / "difficulty_hard_10pct_bf16").values():
        assert counts == 2  # once in each of two epochs
    levels = {"Level 5"}
    hard = replayed(mixed / "runs" / "difficulty_hard_10pct_bf16")
    rows = {row.key: row.fields for row in plan_of(mixed / "runs" / "difficulty_hard_10pct_bf16").stages[0].train}
    assert {f"Level {rows[key]['level']}" for key in hard} == levels


def plan_of(path: Path) -> Any:
    from perdure.training.folder import RunFolder
    from perdure.training.plan import make_plan

    return make_plan(RunFolder(path).settings())


def replayed(run: Path) -> dict[str, int]:
    lines = [json.loads(line) for line in (run / "keys" / "stage-002.jsonl").read_text().splitlines()]
    return {key: times for task, key, _, times, *_ in lines if task == "MATH" and times}


def test_phase_a_and_its_losses_are_found_again(
    perdure: Callable[..., Any], mixed: Path, tinyllama: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Finished selections stay as they are; a new one trains no first phase and measures no loss."""
    from perdure.strategies import rehearsal

    out = tmp_path / "out"
    shutil.copytree(mixed, out)
    measure = rehearsal.row_losses

    def only_of_the_second(ctx: Any, rows: Any) -> Any:
        assert {row.task for row in rows} == {"HotpotQA"}
        return measure(ctx, rows)

    monkeypatch.setattr(rehearsal, "row_losses", only_of_the_second)
    before = (out / "runs" / "difficulty_hard_10pct_bf16" / "metrics.jsonl").read_bytes()
    moved = shutil.copytree(data, tmp_path / "data")
    done = perdure(
        "mix", "--selection-method", "difficulty_hard,loss_ascending", *default(tinyllama, moved), "--out", out
    )
    assert done.code == 2  # the run's settings name other files
    assert "stream.tasks.0.train" in done.err
    done = perdure(
        "mix", "--selection-method", "difficulty_hard,loss_ascending", *default(tinyllama, data), "--out", out
    )
    assert done.code == 0, done.err
    assert "was trained before" in done.out
    assert "difficulty_hard: finished already" in done.out
    assert (out / "runs" / "difficulty_hard_10pct_bf16" / "metrics.jsonl").read_bytes() == before
    assert history(out, "loss_ascending_10pct_bf16")["replayed_rows"] == 4
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert rows[0]["selection"] == "none"  # the table has all that stand in the folder
    assert len(rows) == 4


def test_what_was_trained_on_other_rows_is_refused_before_anything_is_trained(
    perdure: Callable[..., Any], mixed: Path, tinyllama: Path, data: Path, tmp_path: Path
) -> None:
    """A file changes under the same keys, or something else is measured: no phase A, no old numbers as new ones."""
    out = tmp_path / "out"
    shutil.copytree(mixed, out)
    text = (data / "hotpot.jsonl").read_text()
    arguments = ["mix", "--selection-method", "difficulty_hard", *default(tinyllama, data), "--out", out]
    try:
        (data / "hotpot.jsonl").write_text(text.replace("It is tall.", "It is small."))
        done = perdure(*arguments)
    finally:
        (data / "hotpot.jsonl").write_text(text)
    assert done.code == 2
    assert "begun with another model, other rows" in done.err
    assert "phase A" not in done.out
    assert "begun with" in perdure(*arguments, "--generate-rows", "3").err
    assert "lr: 0.01 there, 0.02 now" in perdure(*arguments, "--lr", "0.02").err
    shutil.rmtree(out / "runs" / "difficulty_hard_10pct_bf16" / "checkpoints")
    assert "holds results but no checkpoint" in perdure(*arguments).err
    assert (out / "runs" / "difficulty_hard_10pct_bf16" / "results.json").is_file()


def test_an_adapter_that_was_not_written_any_more_is_written(
    perdure: Callable[..., Any], mixed: Path, tinyllama: Path, data: Path, tmp_path: Path
) -> None:
    """Killed between the end of phase A and its export: the adapter has the bytes that it would have had."""
    out = tmp_path / "out"
    shutil.copytree(mixed, out)
    (home,) = out.glob("math_adapter_*")
    expected = (home / "adapter_model.safetensors").read_bytes()
    (home / "adapter_config.json").unlink()
    (home / "adapter_model.safetensors").unlink()
    done = perdure("mix", "--selection-method", "none", *default(tinyllama, data), "--out", out)
    assert done.code == 0, done.err
    assert "its adapter is written" in done.out
    assert (home / "adapter_model.safetensors").read_bytes() == expected


def test_messages_of_a_signal_within_a_message_wait() -> None:
    """A signal's handler that speaks while the process sends: both messages arrive, in order, and nothing hangs."""
    from multiprocessing import Pipe

    from perdure.recipes.mixing.parallel import Remote

    here, there = Pipe(duplex=False)
    remote = Remote("m", there)

    class Sending:
        def send(self, message: Any) -> None:
            if message[2] == "first":
                remote.say("from the handler")
            there.send(message)

    remote.pipe = Sending()  # type: ignore[assignment]
    remote.say("first")
    assert [here.recv()[2] for _ in range(2)] == ["first", "from the handler"]


def test_a_process_that_dies_is_named() -> None:
    from functools import partial

    from perdure.recipes.mixing.parallel import Failed, run_all
    from perdure.training.display import Display

    with pytest.raises(Failed, match="bad: its process ended with 7"):
        run_all(["bad"], partial(_die, 7), 2, Display(), "perdure mix")


def _die(code: int, name: str, display: Any) -> None:
    import os

    os._exit(code)


def test_own_files_and_the_other_options(
    perdure: Callable[..., Any], tinyllama: Path, data: Path, tmp_path: Path
) -> None:
    """Two selections side by side, resampled by tokens, in fp32."""
    arguments = [
        "--model", tinyllama, "--task-a", data / "first.jsonl", "--task-b", data / "second.jsonl",
        "--mix-percentage", "0.25", "--mix-unit", "tokens", "--resample", "--n-train", "16", "--n-val", "4",
        "--task-a-epochs", "1", "--task-b-epochs", "1", "--eval-every", "1", "--max-seq-length", "64",
        "--batch-size", "8",
        "--micro-batch-size", "4", "--gradient-checkpointing", "--precision", "fp32", "--lr", "1e-3",
        "--difficulty-field", "hops", "--context", "support", "--seed", "3", "--generate-rows", "2", "--set",
        "lora.r=4",
    ]  # fmt: skip
    methods = "difficulty_easy,surprise"
    out = tmp_path / "out"
    done = perdure("mix", "--selection-method", methods, *arguments, "--workers", "2", "--out", out)
    assert done.code == 0, done.err
    for method in methods.split(","):
        found = history(out, f"{method}_25pct_tokens_resampled_fp32", "first_to_second")
        assert len(found["first_loss"]) == len(found["steps"]) == 3
        # A quarter of 16 rows of two or three target tokens (the digit in one piece or two, and the end).
        assert 0.2 * 16 * 2 <= found["replayed_target_tokens"] <= 0.25 * 16 * 3 + 2
    assert "exact match" in (out / "results.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--selection-method", "none", "--mix-percentage", "0"], "--mix-percentage must be above 0"),
        (["--selection-method", "none", "--mix-percentage", "1.5"], "at most 1"),
        (["--selection-method", "hardest"], "--selection-method: unknown policy 'hardest'"),
        (["--selection-method", "surprise"], "surprise needs --resample"),
        (["--selection-method", ","], "none was given"),
        (["--selection-method", "none", "--precision", "fp16"], "--precision must be one of bf16, fp32"),
        (["--selection-method", "none", "--lr", "0"], "--lr must be positive"),
        (["--selection-method", "none", "--task-a", "nowhere.jsonl"], "--task-a nowhere.jsonl: no such file"),
        (["--selection-method", "difficulty_hard", "--difficulty-field", "hardness"], "no column 'hardness'"),
        (["--selection-method", "none", "--model", "nowhere/"], "nowhere"),
    ],
    ids=str,
)
def test_mistakes(
    perdure: Callable[..., Any], tinyllama: Path, data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = perdure("mix", *default(tinyllama, data), *arguments, "--out", tmp_path / "out")
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_columns_that_nobody_knows(
    perdure: Callable[..., Any], tinyllama: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "odd.jsonl").write_text('{"riddle": "r", "reply": "s"}\n' * 3)
    odd = ["--selection-method", "none", "--task-b", tmp_path / "odd.jsonl", "--out", tmp_path / "out"]
    done = perdure("mix", *default(tinyllama, data), *odd)
    assert done.code == 2
    assert "its columns are riddle, reply" in done.err
    (tmp_path / "odd.yaml").write_text(
        'train: odd.jsonl\ntemplate: {prompt: "{riddle} ", answer: "{reply}"}\nkey: riddle\n'
    )
    from perdure.recipes.mixing.data import task_of

    spec, rows = task_of(str(tmp_path / "odd.yaml"), "--task-b", "full")
    assert (spec.name, rows) == ("odd", 3)


def test_a_changed_loss_file_is_not_used(make_lm: Any, make_lm_rows: Any, tmp_path: Path) -> None:
    """Another base, another weight, another token: each is measured again; the same ones are not."""
    from perdure.recipes.mixing.losses import CachedLosses

    rows, model = make_lm_rows(5, task="a"), make_lm()
    measured = []

    class Ctx:
        def __init__(self, model: Any) -> None:
            self.model = model

    def measure(ctx: Any, rows: Any) -> dict[str, float]:
        measured.append(1)
        return {f"a\0{row.key}": float(i) for i, row in enumerate(rows)}

    def losses(rows: Any = rows, model: Any = model, base: str = "x") -> dict[str, float]:
        said: list[str] = []
        return CachedLosses(tmp_path, "a", {"model.safetensors": base}, measure, said.append)(Ctx(model), rows)

    first = losses()
    assert losses() == first
    assert len(measured) == 1
    assert (tmp_path / "a_losses_5_samples.json").is_file()
    other = [rows[0].but(x=rows[0].x + 1), *rows[1:]]
    for changes in ({"base": "y"}, {"rows": other}, {"model": make_lm(seed=1)}):
        count = len(measured)
        losses(**changes)
        assert len(measured) == count + 1
    (tmp_path / "a_losses_5_samples.json").write_text("{torn")
    assert losses() == first


def test_out_of_memory_names_the_options_and_goes_on(
    perdure: Callable[..., Any], tinyllama: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Two steps into phase B a device begins to hold four rows of a micro-batch only; then held-out rows too."""
    from perdure.models import objectives

    forward, steps = objectives.forward, [0]

    def limited(model: Any, batch: Any) -> Any:
        steps[0] += model.training
        if model.training and steps[0] > 8 and len(batch.examples) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, batch)

    monkeypatch.setattr(objectives, "forward", limited)
    out = tmp_path / "out"
    arguments = ["mix", "--selection-method", "none", *default(tinyllama, data), "--out", out]
    done = perdure(*arguments)
    assert done.code == 1
    assert "out of memory at step 10: 8 rows of up to" in done.err
    assert "--micro-batch-size 4, or --batch-size 4 (another effective batch, so a new --out)" in done.err
    assert done.err.strip().endswith("--resume --micro-batch-size 4")
    assert (out / "runs" / "none_0pct_bf16" / "checkpoints" / "step-00000009").is_dir()
    done = perdure(*arguments, "--resume", "--micro-batch-size", "4")
    assert done.code == 0, done.err
    assert history(out, "none_0pct_bf16")["steps"][-1] == 6

    def full(model: Any, batch: Any) -> Any:
        if not model.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, batch)

    monkeypatch.setattr(objectives, "forward", full)
    arguments[-1] = tmp_path / "other"
    done = perdure(*arguments)
    assert done.code == 1
    assert "out of memory while scoring held-out rows, 100 at once" in done.err
    assert "--set evaluation_batch_size=25" in done.err
