"""Erase 1, 10 and 100 records from a run on nano, and compare every byte with a run on files without them."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Set
from pathlib import Path
from typing import Any

import yaml

from benchmarks.torture import digest
from perdure.recipes.find import read_recipe
from perdure.streams import arena

# How many records are erased, and from which tasks.
CASES = ((1, ("grid",)), (1, ("comparison",)), (10, ("math", "grid")), (100, arena.KINDS))
ROWS, HELD_OUT = 800, 100


def write_data(folder: Path, gone: Set[str] = frozenset()) -> None:
    """The arena's five tasks as JSON lines, without the rows of these ids."""
    folder.mkdir()
    for kind in arena.KINDS:
        for part, items in zip(("train", "held"), arena.split(kind, ROWS, HELD_OUT, 0), strict=True):
            rows = (item.row() for item in items)
            text = "".join(json.dumps(row) + "\n" for row in rows if row["id"] not in gone)
            (folder / f"{kind}-{part}.jsonl").write_text(text, encoding="utf-8")


def write_recipe(folder: Path) -> Path:
    """The settings of `arena-tasks` over those files; the memory's size is a number, so that it stays."""
    values: dict[str, Any] = dict(read_recipe("arena-tasks")[0])
    tasks = [{"name": k, "train": f"{k}-train.jsonl", "evaluation": f"{k}-held.jsonl"} for k in arena.KINDS]
    values |= {
        "stream": {"tasks": tasks},
        "continual_strategy": {"replay": {"capacity": 200}},
        "strategy": "replay",
    }
    values["name"] = "erasure"
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def command(*arguments: str | Path) -> float:
    """Seconds of a perdure command, which must succeed."""
    start = time.perf_counter()
    whole = [sys.executable, "-m", "perdure.cli", *map(str, arguments)]
    subprocess.run(whole, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """The command line."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        recipe = write_recipe(base)
        write_data(base / "all")
        run = base / "run"
        seconds = command("run", recipe, "--data", base / "all", "--out", run)
        print(f"the run: {len(arena.KINDS)} tasks of {ROWS} rows, {seconds:.0f} s", flush=True)
        for count, kinds in CASES:
            draw = random.Random(f"erasure/{count}/{kinds}")
            ids = sorted(item.key for kind in kinds for item in arena.split(kind, ROWS, HELD_OUT, 0)[0])
            gone = draw.sample(ids, count)
            for path in (base / "erased", base / "data", base / "without"):
                shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(run, base / "erased")
            write_data(base / "data", set(gone))
            keys = [part for key in gone for part in ("--key", key)]
            seconds = command("erase", base / "erased", *keys)
            anew = command("run", recipe, "--data", base / "data", "--out", base / "without")
            same = digest(base / "erased") == digest(base / "without")
            wrong += not same
            record = json.loads((base / "erased" / "erasures.jsonl").read_text().splitlines()[-1])
            print(
                f"{count:>3} of {', '.join(kinds)}: trained again {', '.join(record['retrained'])}; "
                f"{seconds:.0f} s, a run on the files without them {anew:.0f} s; "
                f"bytes {'equal' if same else 'DIFFER'}",
                flush=True,
            )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
