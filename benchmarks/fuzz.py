"""Mutated recipes, data files and checkpoints: every one is either taken or refused in words, at once.

A case is drawn from its number, so `--only N` repeats one.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track

from perdure.errors import PerdureError
from perdure.models import load as loading
from perdure.models.load import NANO
from perdure.recipes.run import execute, settings_for
from perdure.training.display import Display, Terminal
from perdure.training.folder import RunFolder
from perdure.training.plan import make_plan
from perdure.training.run import Run

SECONDS = 20
RECIPE: dict[str, Any] = {
    "stream": {
        "tasks": [
            {"name": "sums", "train": "sums.jsonl", "evaluation": "sums-held.jsonl", "train_rows": 6},
            {
                "name": "words",
                "train": "words.csv",
                "holdout": 0.25,
                "template": {"prompt": "{question} ", "answer": "{answer}"},
                "where": {"level": 1},
            },
            {"name": "talk", "train": "talk.jsonl", "holdout": 1},
        ]
    },
    "probe": {"name": "probe", "train": "sums-held.jsonl"},
    "epochs": 1,
    "batch_size": 4,
    "micro_batch_size": 2,
    "optimizer": {"type": "adamw", "lr": 1e-3, "weight_decay": 0.0},
    "schedule": {"type": "cosine", "warmup": 0.1},
    "clip": 1.0,
    "strategy": "replay+ewc",
    "continual_strategy": {"replay": {"capacity": "30%", "ratio": 0.5}, "ewc": {"strength": 10.0}},
    "evaluation": {"generate_rows": 2},
    "seed": 0,
}
NASTY: tuple[bytes, ...] = (
    b"\x00", b"\xff\xfe", b"null", b"-1", b"1e999", b"NaN", b"true", b'""', b"[]", b"{}", b"{{", b"}", b":", b"- ",
    b"\n", b"\r\n", b'"', b"'", b"&a [*a]", b"!!python/object/apply:os.system [x]", b"../../../etc/passwd",
    b"9" * 400, b"[" * 2000, "\u202e\U0001f9ea".encode(), b"<script>", b"\t", b",", b"2", b"0", b"0.5", b"%",
    b"?" * 70_000,
)  # fmt: skip


class Slow(BaseException):
    """A case took longer than it may."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise Slow when the block takes longer."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Slow

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """The data with one to four small wounds."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice((0, 1, 1, 4, 40)))
        way = draw.randrange(6)
        if way == 0:
            data = data[:at] + draw.choice(NASTY) + data[end:]
        elif way == 1:
            data = data[:at] + data[end:]
        elif way == 2 and data:
            at = draw.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif way == 3:
            data = data[:at]
        elif way == 4:
            data = data[:end] + data[at:]
        else:
            lines = data.split(b"\n")
            draw.shuffle(lines)
            data = b"\n".join(lines)
    return data


def mutate_tree(value: Any, draw: random.Random) -> Any:
    """The settings with one leaf or branch replaced, removed, renamed or doubled."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    value = json.loads(json.dumps(value))
    walk(value)
    node, key = draw.choice(places)
    way = draw.randrange(4)
    odd = draw.choice(
        (None, -1, 0, 1, 2, 3.5, 1e308, float("nan"), float("inf"), True, "", "x", "30%", "naive", [], {}, [1],
         {"a": 1}, "\x00", "../..", "/etc/passwd", "/dev/zero", "{a[0]}", "{", 10**30, "é" * 300, "nano",
         "talk.jsonl")
    )  # fmt: skip
    if way == 0 and isinstance(node, dict):
        del node[key]
    elif way == 1 and isinstance(node, dict):
        node[str(key) + "_"] = node.pop(key)
    elif way == 2 and isinstance(node, list):
        node.append(node[key])
    else:
        node[key] = odd
    return value


def prepare(base: Path) -> None:
    """A recipe, its data, a model of a few thousand weights, and a finished run of it."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    base.mkdir(parents=True)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(base / "model")
    tokenizer.save_pretrained(base / "model")
    sums = [{"id": f"s{i}", "prompt": f"{i} + {i} =", "answer": f" {2 * i}", "level": i % 3} for i in range(12)]
    (base / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums[:8]))
    (base / "sums-held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums[8:]))
    (base / "words.csv").write_text(
        "question,answer,level\n" + "".join(f'"what, is {i}?",it is {i},{i % 2}\n' for i in range(12))
    )
    turns = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(5)
    ]
    (base / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    (base / "recipe.yaml").write_text(yaml.safe_dump({"model": str(base / "model"), **RECIPE}, sort_keys=False))
    settings, place = settings_for(str(base / "recipe.yaml"), {}, [])
    execute(settings, place, RunFolder(base / "run"), Terminal(stderr=True), "again")


def a_recipe(base: Path, draw: random.Random) -> Callable[[], Any]:
    """A recipe with a wound in its text or its settings; it is planned."""
    path = base / "mutated.yaml"
    if draw.random() < 0.5:
        tree = mutate_tree(yaml.safe_load((base / "recipe.yaml").read_text()), draw)
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
    else:
        path.write_bytes(mutate_bytes((base / "recipe.yaml").read_bytes(), draw))
    return lambda: make_plan(*settings_for(str(path), {}, []))


def a_data_file(base: Path, draw: random.Random) -> Callable[[], Any]:
    """A data file with a wound; the recipe is planned on it."""
    data = base / "data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    name = draw.choice(("sums.jsonl", "sums-held.jsonl", "words.csv", "talk.jsonl"))
    (data / name).write_bytes(mutate_bytes((base / name).read_bytes(), draw))
    return lambda: make_plan(*settings_for(str(base / "recipe.yaml"), {"data": str(data)}, []))


def a_run(base: Path, draw: random.Random) -> Callable[[], Any]:
    """A finished run with a wound in one of its files; it is taken up and reported on."""
    from perdure.recipes.audit import audit_run
    from perdure.recipes.show import rebuild

    copy = base / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(base / "run", copy, ignore=shutil.ignore_patterns("plots", "model"))
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.name not in (".lock", "report.html"))
    wounded = draw.choice(files)
    wounded.write_bytes(mutate_bytes(wounded.read_bytes(), draw))
    folder = RunFolder(copy)

    def use() -> None:
        settings = folder.settings()
        way = draw.randrange(4)
        if way == 0:
            audit_run(copy, ())
        elif way == 1:
            rebuild([copy], None)
        else:
            Run(make_plan(settings, base), folder, Display(), "again").load()

    return use


KINDS = (a_recipe, a_data_file, a_run)


def listing(base: Path) -> set[str]:
    """Names of all that lies in the folder."""
    return {path.relative_to(base).as_posix() for path in base.rglob("*")}


def one(number: int, base: Path) -> str | None:
    """Run case `number`; what went wrong, or None."""
    draw = random.Random(f"fuzz/{number}")
    action = KINDS[number % len(KINDS)](base, draw)
    outside = listing(base.parent) if number % 50 == 0 else set()
    try:
        with within(SECONDS):
            action()
    except PerdureError as error:
        if error.exit_code != 2 or not str(error).strip():
            return f"exit code {error.exit_code}: {error}"
    except Slow:
        return f"took more than {SECONDS} s"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if outside and not listing(base.parent) - outside <= {
        f"{base.name}/copy/{name}" for name in listing(base / "copy")
    }:
        return f"wrote {sorted(listing(base.parent) - outside)[:3]}"
    return None


def whole(number: int, base: Path) -> str | None:
    """Run a mutated recipe as a command; what went wrong, or None."""
    draw = random.Random(f"fuzz/command/{number}")
    a_recipe(base, draw)
    out = base / "whole"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "perdure.cli", "run", str(base / "mutated.yaml"), "--out", str(out)]
    before = listing(base)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=base, check=False)
    except subprocess.TimeoutExpired:
        return "hung"
    written = {name for name in listing(base) - before if not name.startswith("whole")}
    if done.returncode not in (0, 1, 2) or "Traceback" in done.stderr or written:
        return f"exit code {done.returncode}, wrote {sorted(written)}: {done.stderr[-400:]}"
    return None


@lru_cache
def _language(source: str) -> Any:
    return original(source)


original = loading.load


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--commands", type=int, default=50)
    parser.add_argument("--only", type=int, help="run this case alone, with its traceback")
    given = parser.parse_args()
    console, wrong = Console(soft_wrap=True, stderr=True), 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "fuzz"
        prepare(base)
        if given.only is not None:
            KINDS[given.only % len(KINDS)](base, random.Random(f"fuzz/{given.only}"))()
            return
        loading.load = _language  # the model itself is not mutated, and is the slowest part
        sys.stdout = (Path(folder) / "said").open("w")
        for number in track(range(given.cases), "cases", console=console):
            if (fault := one(number, base)) is not None:
                wrong += 1
                console.print(f"case {number}: {fault}"[:600], markup=False)
        loading.load = original
        for number in track(range(given.commands), "commands", console=console):
            if (fault := whole(number, base)) is not None:
                wrong += 1
                console.print(f"command {number}: {fault}"[:900], markup=False)
    console.print(f"{given.cases} cases and {given.commands} commands: {wrong} went wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
