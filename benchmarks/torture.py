"""Kill runs at random moments, go on with them, and compare every byte of what they end with."""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from inspect import CO_GENERATOR
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track

from perdure.cli import app
from perdure.config import read_yaml, validate
from perdure.models.load import NANO
from perdure.tracking import read_events
from perdure.training.folder import FINAL, RunFolder
from perdure.training.plan import make_plan
from perdure.training.run import Run
from perdure.training.settings import RunSettings

STRATEGIES = (
    "arena", "jax", "naive", "replay", "derpp", "ewc", "si", "mas", "lwf", "gem", "agem", "freeze-bottom",
    "packnet", "pnn", "olora", "osf", "slao", "magmax", "ties", "ema", "prompt-pool", "replay+ewc", "lwf+agem",
    "si+ema",
)  # fmt: skip
TUNINGS = ("full", "lora", "soft-prompt")
# What a strategy refuses.
ONLY = {"arena": ("lora", "multi-lora", "reptile"), "jax": ("head", "lora", "full"),
        "olora": ("lora",), "slao": ("lora",), "osf": ("full",),
        "prompt-pool": ("full",),
        "pnn": ("lora", "soft-prompt"), "packnet": ("full", "lora"), "freeze-bottom": ("full", "lora")}  # fmt: skip
ROWS = [(strategy, tuning) for strategy in STRATEGIES for tuning in ONLY.get(strategy, TUNINGS)]
RECIPE: dict[str, Any] = {
    "model": "nano",
    "stream": {"arena": {"kinds": ["math", "grid", "sequence"], "train_rows": 32, "evaluation_rows": 12}},
    "epochs": 1,
    "batch_size": 8,
    "micro_batch_size": 5,
    # Carried over from task to task, so that the state at the end holds the optimizer's too.
    "optimizer": {"type": "adamw", "lr": 1e-3, "at_boundary": "continue"},
    "schedule": {"type": "cosine", "warmup": 0.1},
    "clip": 1.0,
    "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
    "soft_prompt": {"tokens": 4},
    "continual_strategy": {
        "replay": {"capacity": "3KB", "memory": "balanced", "unit": "tokens"},
        "derpp": {"capacity": 20, "ratio": 0.7, "top_k": 5},
        "ewc": {"strength": 10.0, "fisher": "true"},
        "si": {"strength": 100.0},
        "mas": {"strength": 0.01},
        "gem": {"per_task": 6},
        "agem": {"per_task": 8, "sample": 4},
        "packnet": {"prune_percentage": 0.6, "prune_to": "start", "use_magnitude_pruning": False},
        "pnn": {"rank": 2},
        "prompt-pool": {"size": 4, "length": 2, "deep": True},
        "ema": {"every": "step", "decay": 0.9},
    },
    "evaluation": {"generate_rows": 6},
    "checkpoint_every": 2,
}
# Online learning: its tunings are its methods.
ARENA = [
    "arena", "--kinds", "math,grid", "--episodes", "12", "--eval-tasks", "12", "--eval-every", "4", "--seed", "3",
    "--set", "pool=20", "--set", "probe=false", "--set", "online.checkpoint_every=2", "--set", "lora.dropout=0.1",
]  # fmt: skip
ARENA_ONLY = {"lora": ["--replay", "reservoir", "--memory", "6", "--window", "2", "--learn-on", "errors"]}
# Yields of reactions, by a small random Mistral in JAX; with all weights under EWC.
JAX = [
    "reactions", "--backend", "jax", "--epochs", "2", "--batch-size", "4", "--holdout", "0.5", "--lr", "0.005",
    "--heads", "2", "--task-columns", "halide", "--set", "head.hidden=12", "--set", "evaluation.samples=3",
    "--set", "checkpoint_every=1",
]  # fmt: skip
JAX_EWC = ["--setting", "ewc", "--set", "continual_strategy.ewc.strength=3"]
TIMES = ("tokens_per_second", "seconds")  # differ from run to run
PACKAGE = str(Path(sys.modules["perdure"].__file__ or "").parent)


class Killed(BaseException):
    """What is raised in the middle of a run; nothing in the package catches it."""


def digest(path: Path) -> str:
    """SHA-256 over all that a run ends with: final state, exported model or adapter, scores, keys, and its log."""
    places = (path / "checkpoints" / FINAL, path / "model", path / "adapter", *path.glob("checkpoint_ep*"))
    files = [file for place in places for file in place.rglob("*") if file.is_file()]
    found = hashlib.sha256()
    for file in sorted([*files, *path.glob("scores*.csv"), *path.glob("keys/*.jsonl")]):
        found.update(file.relative_to(path).as_posix().encode() + b"\0" + file.read_bytes())
    for event in read_events(path / "metrics.jsonl"):
        if event["event"] != "checkpoint":  # where a run was stopped it has one more
            found.update(repr([(name, value) for name, value in event.items() if name not in TIMES]).encode())
    return found.hexdigest()


def write_recipe(path: Path, strategy: str, tuning: str, **changes: Any) -> Path:
    """A recipe's file for one row of the table; for the arena and for JAX, a file with the command line."""
    if strategy == "arena":
        path.write_text(yaml.safe_dump([*ARENA, "--method", tuning, *ARENA_ONLY.get(tuning, [])]))
        return path
    if strategy == "jax":
        data, model = write_reactions(path.parent / "reactions")
        setting = JAX_EWC if tuning == "full" else ["--setting", "replay"]
        path.write_text(
            yaml.safe_dump([*JAX, *setting, "--tuning", tuning, "--data", str(data), "--model", str(model)])
        )
        return path
    settings = {**RECIPE["continual_strategy"]}
    if (strategy, tuning) == ("ewc", "lora"):
        settings["ewc"] = {**settings["ewc"], "space": "weight"}
    recipe = {**RECIPE, "strategy": strategy, "tuning": tuning, "continual_strategy": settings, **changes}
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_reactions(path: Path) -> tuple[Path, Path]:
    """A table of three tasks of reactions, and a random Mistral with nano's tokenizer."""
    import torch
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    table, model = path / "table.csv", path / "model"
    if not table.is_file():
        tokenizer = AutoTokenizer.from_pretrained(NANO)
        tokenizer.save_pretrained(model)
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=7, max_position_embeddings=128,
        )  # fmt: skip
        MistralForCausalLM(config).save_pretrained(model)
        lines = [
            f"{halide},{halide}{'C' * chain}.B{'O' * acid}>>C{'C' * chain}{'O' * acid},{7 * chain + 5 * acid}"
            for halide in ("Cl", "Br", "I")
            for chain in range(1, 5)
            for acid in range(1, 5)
        ]
        table.write_text("\n".join(["halide,reaction_smiles,yield", *lines, ""]))
    return table, model


def run(recipe: Path, out: Path) -> None:
    """Run a recipe in this process, or go on with what is in the folder."""
    if given := arguments(recipe):
        with redirect_stdout(StringIO()):
            app([*given, "--out", str(out), "--resume"], standalone_mode=False)
        return
    folder = RunFolder(out)
    with folder.locked():
        Run(make_plan(validate(RunSettings, read_yaml(recipe), str(recipe))), folder).execute()


def arguments(recipe: Path) -> list[str]:
    """The command line of a run that has no recipe: the arena's, JAX's; none for others."""
    values = yaml.safe_load(recipe.read_text())
    return values if isinstance(values, list) else []


def command_of(recipe: Path, out: Path) -> list[str]:
    """The command that runs the recipe, or goes on with it."""
    asked = arguments(recipe) or ["run", str(recipe)]
    return [sys.executable, "-m", "perdure.cli", *asked, "--out", str(out), "--resume"]


@contextmanager
def counting(limit: int | None) -> Iterator[list[int]]:
    """Count calls of the package's functions; raise Killed at the one with number `limit`.

    Generators are left out: one that is being closed swallows what is raised in it.
    """
    calls = [0]

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if (
            event in ("call", "return")
            and code.co_filename.startswith(PACKAGE)
            and not code.co_flags & CO_GENERATOR
        ):
            calls[0] += 1
            if calls[0] == limit:
                raise Killed

    sys.setprofile(watch)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def raised(recipe: Path, out: Path, calls: int, draw: random.Random) -> str:
    """Stop a run in this process at a random call or return of one of the package's functions, then go on."""
    shutil.rmtree(out, ignore_errors=True)
    at = draw.randrange(1, calls)
    try:
        with counting(at):
            run(recipe, out)
    except Killed:
        pass
    run(recipe, out)
    return f"raised at call {at:,} of {calls:,}"


def killed(recipe: Path, out: Path, seconds: float, draw: random.Random) -> str:
    """SIGKILL a process that runs the recipe after a random time, then go on by the command line."""
    shutil.rmtree(out, ignore_errors=True)
    command = command_of(recipe, out)
    wait = draw.uniform(0.3, 1.0) * seconds
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return f"SIGKILL after {wait:.1f} s of {seconds:.1f}"


def torture(
    kills: int, processes: int, seed: int, base: Path, console: Console, rows: Sequence[tuple[str, str]] = ROWS
) -> int:
    """Do it; print a line for each that ended otherwise, and the sum. Returns how many did."""
    references: dict[tuple[str, str], tuple[str, int, float]] = {}
    for strategy, tuning in track(rows, "undisturbed", console=console):
        recipe, out = write_recipe(base / f"{strategy}-{tuning}.yaml", strategy, tuning), base / "undisturbed"
        with counting(None) as calls:
            run(recipe, out)
        command = command_of(recipe, base / "timed")
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        references[strategy, tuning] = (digest(out), calls[0], time.perf_counter() - start)
        for path in (out, base / "timed"):
            shutil.rmtree(path)
    wrong = 0
    for number in track(range(kills), "killed", console=console):
        strategy, tuning = rows[number % len(rows)]
        expected, count, seconds = references[strategy, tuning]
        draw = random.Random(f"torture/{seed}/{number}")
        recipe, out = base / f"{strategy}-{tuning}.yaml", base / "run"
        # Spread over the table: every fifth one by default.
        by_signal = number * processes // kills < (number + 1) * processes // kills
        how = killed(recipe, out, seconds, draw) if by_signal else raised(recipe, out, count, draw)
        if digest(out) != expected:
            wrong += 1
            console.print(f"DIFFERS: {strategy} {tuning}, kill {number}, seed {seed}: {how}")
    console.print(f"{kills - wrong} of {kills} ended with the same bytes; {processes} of the kills were SIGKILLs")
    return wrong


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=24, help="how many of them are SIGKILLs of a process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="some of the strategies, by commas; default: all")
    given = parser.parse_args()
    names = given.only.split(",") if given.only else STRATEGIES
    if unknown := [name for name in names if name not in STRATEGIES]:
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(STRATEGIES)}")
    rows = [row for row in ROWS if row[0] in names]
    with tempfile.TemporaryDirectory() as folder:
        # What one run of JAX compiled, the next takes from the disk.
        os.environ |= {
            "PERDURE_CACHE": f"{folder}/cache",
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        console = Console(soft_wrap=True)
        sys.exit(bool(torture(given.kills, given.processes, given.seed, Path(folder), console, rows)))


if __name__ == "__main__":
    main()
