"""Options that several commands share."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from perdure.errors import ConfigError

Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run.", show_default=False)]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of everything that is drawn.", min=0, max=(1 << 63) - 1)
]
Model = Annotated[str | None, typer.Option("--model", help="nano (the default), a model folder, or a hub name.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")]
# Hidden, for such a command always goes on by itself; but a run of it that was stopped says to add it.
GoesOn = Annotated[bool, typer.Option("--resume", hidden=True)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, as in optimizer.lr=3e-4. Repeatable."),
]
Track = Annotated[
    list[str] | None,
    typer.Option("--track", metavar="NAME", help="Also log to mlflow or tensorboard. Repeatable."),
]
Data = Annotated[Path | None, typer.Option("--data", help="Folder in which data files are looked up first.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


def refuse_before(context: typer.Context) -> None:
    """Refuse options that stand before a subcommand, which has its own."""
    given = [
        parameter.opts[-1]
        for parameter in context.command.params
        if (source := context.get_parameter_source(parameter.name or "")) and source.name == "COMMANDLINE"
    ]
    if given:
        sub = context.invoked_subcommand
        raise ConfigError(f"{', '.join(given)}: stands before {sub}, which would not see it; put it behind {sub}")


def again() -> str:
    """The command that was given, without --resume."""
    return shlex.join(["perdure", *(part for part in sys.argv[1:] if part != "--resume")])
