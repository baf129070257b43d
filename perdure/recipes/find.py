"""Recipes by name or file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perdure.config import read_yaml
from perdure.errors import ConfigError, unknown_name

FOLDER = Path(__file__).parent


def shipped() -> dict[str, str]:
    """Names of the recipes that come with perdure, and what each is."""
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        found[path.stem] = str(read_yaml(path).get("description", ""))
    return found


def read_recipe(name: str) -> tuple[dict[str, Any], Path]:
    """A recipe's settings and the folder that its relative paths start from.

    Args:
        name: a shipped recipe's name, or the path of a YAML file (a run's config.yaml too).

    Raises:
        ConfigError: neither.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
        if not path.is_file():
            known = [p.stem for p in FOLDER.glob("*.yaml")]
            raise ConfigError(unknown_name("recipe", name, known) + " Or give the path of a YAML file.")
    values = read_yaml(path)
    recorded = values.pop("recorded", None) or {}
    # A run's config.yaml still means the paths that its recipe meant.
    return values, Path(recorded.get("recipe_folder") or path.resolve().parent)
