"""The command that copies a Mistral from one layout of files to another."""

from __future__ import annotations

from pathlib import Path

from perdure.jax.port import port
from perdure.jax.source import MANIFEST


def port_model(source: Path, dest: Path, to: str = "jax") -> None:
    """Port a model and print what was written and how to go on."""
    port(source, dest, to, print)
    if (dest / MANIFEST).is_file():
        print(f"{dest}: load it with perdure.jax.load({str(dest)!r})")
    else:
        print(f"{dest}: written in the {to} layout")
