"""Every example runs by itself, in a folder of its own, and prints something."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from perdure.strategies import STRATEGIES

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert {"quickstart.py", "custom_strategy.py", "languages.py"} <= {path.name for path in EXAMPLES}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """What an example prints; each is run once."""

    @cache
    def run(example: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", str(example)],
            cwd=tmp_path_factory.mktemp(example.stem),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, printed: Callable[[Path], str]) -> None:
    assert printed(example).strip()


def test_the_custom_strategy_forgets_less(printed: Callable[[Path], str]) -> None:
    """As its second column says: it still knows the first task, which naive training has lost."""
    (example,) = (path for path in EXAMPLES if path.stem == "custom_strategy")
    after = {line.split()[0]: float(line.split()[2]) for line in printed(example).splitlines()[1:]}
    assert after["spread"] > after["naive"] + 0.3


def test_the_languages_are_forgotten_and_kept(printed: Callable[[Path], str]) -> None:
    """Every strategy has a line. Naive training knows the first one when it is new, and loses it: chance is 0.1."""
    (example,) = (path for path in EXAMPLES if path.stem == "languages")
    lines = printed(example).splitlines()
    first = {line.split()[0]: line.split("→") for line in lines if "→" in line and " + " not in line}
    refused = {line.split()[1].rstrip(":") for line in lines if line.startswith("refused: ")}
    assert first.keys() | refused == set(STRATEGIES)
    new = {name: float(before.split()[-1]) for name, (before, _) in first.items()}
    end = {name: float(after.split()[0]) for name, (_, after) in first.items()}
    assert new["naive"] > 0.9
    assert end["naive"] < 0.3
    for name in ("replay", "derpp", "gem", "packnet", "pnn"):
        assert end[name] > end["naive"] + 0.4, name
