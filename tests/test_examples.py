"""Every example runs by itself, in a folder of its own, and prints something."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert {"quickstart.py", "custom_strategy.py"} <= {path.name for path in EXAMPLES}


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
            timeout=60,
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
