"""The rooms import in one direction, and the command line starts without anything heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import perdure

ROOT = Path(perdure.__file__).parent
# Each room may import those of the lines above it, and itself.
ORDER = (
    ("errors", "types", "order"),
    ("config", "storage", "callbacks"),
    ("sealed",),
    ("tracking", "allocator"),
    ("streams", "memory", "models"),
    ("strategies",),
    ("evaluation",),
    ("training",),
    ("teaching",),
    ("recipes",),
    ("cli_options",),
    ("cli_arena", "cli_reactions"),
    ("cli",),
)
BASE = {"errors", "types"}
BESIDE = {
    "report": BASE,
    "jax": BASE | {"order", "config", "storage", "sealed", "tracking", "streams", "evaluation", "report"},
}
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pydantic", "matplotlib", "yaml")


def allowed(room: str) -> set[str]:
    if room in BESIDE:
        return {room, *BESIDE[room]}
    line = next(i for i, rooms in enumerate(ORDER) if room in rooms)
    above = {name for rooms in ORDER[:line] for name in rooms}
    return above | {room} | ({"report", "jax"} if room == "recipes" or room.startswith("cli") else set())


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> dict[str, int]:
    """Rooms of perdure that a file imports anywhere in it, also for types alone, and a line of each."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("perdure."):
                found[name.split(".")[1]] = node.lineno
    return found


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def test_every_room_has_its_place() -> None:
    known = {name for rooms in ORDER for name in rooms} | set(BESIDE)
    assert {room_of(path) for path in FILES} <= known


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    wrong = {name: line for name, line in imported_rooms(path).items() if name not in allowed(room)}
    assert not wrong, f"{room} must not import {wrong} (line numbers)"


def test_the_walk_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("def f():\n    from perdure.training.run import Run\n    import perdure.cli\n")
    assert imported_rooms(file) == {"training": 2, "cli": 3}
    assert "training" not in allowed("streams")
    assert "models" not in allowed("streams")
    assert "training" not in allowed("report")


def test_types_need_no_library_at_run_time() -> None:
    tree = ast.parse((ROOT / "types.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in top}
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)


def test_the_command_line_imports_nothing_heavy() -> None:
    code = f"import sys, perdure, perdure.cli; print(*(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
