"""The command that makes a run forget rows, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perdure.errors import ConfigError, DataError, RunError
from perdure.order import fingerprint
from perdure.recipes.run import is_jax, quieten
from perdure.recipes.show import print_results, write_pages
from perdure.training.display import Terminal
from perdure.training.folder import RunFolder
from perdure.training.settings import RunSettings

if TYPE_CHECKING:
    from perdure.training.plan import Plan
    from perdure.training.run import Run


def erase_rows(path: Path, keys: Sequence[str], matches: Sequence[str], retrain: bool, resume: bool) -> None:
    """Erase rows from a run, and print what became of it."""
    from perdure.training.erase import erase
    from perdure.training.plan import every_row

    folder = RunFolder(path)
    settings = folder.settings()
    pairs = [_pair(text) for text in matches]
    pending = folder.erasing
    if pending is None:
        if resume:
            raise RunError(f"{path}: no erasure was stopped here")
        if not keys and not pairs:
            raise ConfigError("nothing to erase: give --key, or --match field=value")
        if not folder.finished:
            raise RunError(f"{path} is not finished; go on with it first, with --resume")
    elif keys or pairs:
        raise RunError(f"{path}: an erasure was stopped here; finish it first: perdure erase {path} --resume")
    quieten()
    display = Terminal()
    commands = folder.recorded().get("commands", [])
    make, run = _makers(folder, display)
    with folder.locked():
        wanted = {fingerprint(key) for key in keys}
        if pairs:
            rows = every_row(make(settings), settings.erased)
            for field, value in pairs:
                found = {row.key for row in rows if str(row.fields.get(field)) == value}
                if not found:
                    raise DataError(f"--match {field}={value}: no row of this run matches; {_fields(rows)}")
                wanted |= {fingerprint(key) for key in found}
        way = erase(
            folder,
            wanted,
            make,
            # The command that erases names the keys, which are not to be found here again.
            lambda plan: run(plan, folder, display, f"perdure erase {path}", commands),
            retrain,
            display.say,
        )
        if way is None and pending is None and wanted <= set(settings.erased):
            display.say(f"{path}: erased already")
            return
        if way is None and pending is None:
            raise DataError(
                f"{path}: no row of this run has "
                + ("the key " if len(keys) == 1 else "one of the keys ")
                + ", ".join(map(repr, keys))
                + "; a key is what stands in the row's id column, or a hash of the row where there is none"
            )
        if settings.stream.reactions is not None:
            _write_again(folder, display)
        write_pages([folder.path])
    print_results([folder.path], display)
    display.say(f"record: {folder.erasures}")


def _makers(folder: RunFolder, display: Terminal) -> tuple[Callable[[RunSettings], Plan], Callable[..., Run]]:
    """What makes the plan and the run of the backend that trained what is here."""
    base = folder.recipe_folder
    if is_jax(folder):
        from perdure.recipes.reactions import jax_backend

        return lambda settings: jax_backend.make_plan(settings, base, display.say), jax_backend.JaxRun
    from perdure.training.plan import make_plan
    from perdure.training.run import Run

    return lambda settings: make_plan(settings, base), Run


def _write_again(folder: RunFolder, display: Terminal) -> None:
    """Predictions and tables of a run of reactions, without the rows."""
    from perdure.recipes.reactions.outputs import write_outputs
    from perdure.recipes.reactions.predict import opened

    run, teller = opened(folder.settings(), folder, display)
    run.remember()
    write_outputs(run, teller)
    if (cache := getattr(run.plan.model, "cache", None)) is not None:
        display.say(
            f"note: hidden states of the rows are still kept in {cache.folder}; it may be removed at any time"
        )


def _pair(text: str) -> tuple[str, str]:
    field, sign, value = text.partition("=")
    if not sign or not field:
        raise ConfigError(f"--match {text!r}: must be field=value")
    return field, value


def _fields(rows: Sequence[object]) -> str:
    names = sorted({name for row in rows for name in getattr(row, "fields", {})})
    return "its rows have the fields " + ", ".join(names) if names else "its rows have no fields beside their text"
