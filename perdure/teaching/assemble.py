"""What a teacher is made of: model, probe and book, from what was asked and from what the folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perdure.config import read_yaml, validate
from perdure.errors import ConfigError, RunError
from perdure.models.load import NANO, LanguageModel, identify, load
from perdure.storage import write_text
from perdure.teaching.book import Book
from perdure.teaching.lesson import digest
from perdure.teaching.probe import FILE, Probe, load_probe, of_nano, of_rows, read
from perdure.teaching.pupil import Pupil, hash_weights
from perdure.teaching.settings import LORA, TeachSettings, default_lr, fixed
from perdure.training.folder import RECORDED, RunFolder
from perdure.training.plan import changed_settings, machine, versions

Rows = Sequence[Mapping[str, str]]
IDENTITY = "identity"  # under what was found: what lessons depend on


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What a teacher is made of.

    Attributes:
        pupil: the model that learns.
        probe: rows that stand for what it could do before.
        book: keeps everything on the disk; None: nothing is written.
        base: a hash of the base, the settings that lessons depend on, and the probe.
        notes: what a person should know about how it was begun.
    """

    pupil: Pupil
    probe: Probe
    book: Book | None
    base: str
    notes: tuple[str, ...] = ()


def assemble(
    model: str | LanguageModel | None,
    out: Path | str | None,
    given: TeachSettings | Mapping[str, Any] | None,
    probe: Rows | Path | str | None,
    stack: ExitStack,
) -> Parts:
    """Build all of it; the stack lets go of the folder in the end.

    Raises:
        UsageError: a mistake in what was asked, or a folder that was begun otherwise.
    """
    folder = None if out is None else RunFolder(Path(out))
    if folder is not None and folder.path.is_file():
        raise ConfigError(f"{folder.path} is a file; lessons need a folder")
    settings = settings_of(model, given, folder)
    if folder is not None:
        stack.enter_context(folder.locked())
    language = model if isinstance(model, LanguageModel) else load(settings.model)
    tuned = None
    if settings.run is not None:
        from perdure.teaching.run import continued

        language, tuned = continued(Path(settings.run), settings)
        _check_shape(tuned, given, settings)
    kept = None if folder is None else folder.path / FILE
    found = load_probe(kept) if probe is None and kept is not None and kept.is_file() else _probe(probe, settings)
    pupil = Pupil(language, settings, tuned)
    identity = {
        "base": identify(language),
        "settings": fixed(settings),
        "probe": found.key,
        "start": hash_weights(pupil.weights()),
    }
    book, notes = None, list[str]()
    if folder is not None:
        _check(folder, identity, probe)
        if probe is not None and kept is not None:
            write_text(kept, found.text())
        recorded, notes = _recorded(folder, identity)
        folder.write_settings(settings, recorded)
        book = Book(folder.path)
        stack.callback(book.close)
    return Parts(pupil, found, book, digest(identity), tuple(notes))


def settings_of(
    model: str | LanguageModel | None, given: TeachSettings | Mapping[str, Any] | None, folder: RunFolder | None
) -> TeachSettings:
    """The settings that were asked for; what was not said is as in the folder, or has its default.

    Raises:
        ConfigError: every mistake.
    """
    values = given.model_dump(exclude_unset=True) if isinstance(given, TeachSettings) else dict(given or {})
    if model is not None:
        values["model"] = model.name if isinstance(model, LanguageModel) else _place(model)
    if folder is not None and folder.exists:
        there = read_yaml(folder.config)
        if IDENTITY not in (there.pop(RECORDED, None) or {}):
            raise RunError(f"{folder.path} holds a run that is no lessons; give another folder")
        values = {**there, **values}
    if values.get("run") is not None and "model" not in values:
        values["model"] = _model_of(Path(values["run"]))
    if isinstance(values.get("lora"), Mapping):
        values["lora"] = {**LORA.model_dump(), **values["lora"]}
    name, tuning = str(values.get("model", "nano")), str(values.get("tuning", "lora"))
    if values.get("lr") is None and tuning in ("lora", "soft-prompt"):
        values["lr"] = default_lr(name, tuning)
    return validate(TeachSettings, values, "settings of a teacher")


def _model_of(run: Path) -> str:
    """The name of the model that a run was begun with, which rates and the probe are chosen by."""
    folder = RunFolder(run)
    return str(read_yaml(folder.config).get("model", "nano")) if folder.exists else "nano"


def _recorded(folder: RunFolder, identity: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What was found when the folder was begun, with what changed since; the newest changes in words."""
    before, now = folder.recorded() if folder.exists else {}, {"versions": versions(), "machine": machine()}
    recorded = {**now, **before, IDENTITY: identity}
    latest = {**recorded, **recorded.get("latest", {})}
    changes = [change for what in now for change in changed_settings(latest[what], now[what])]
    if changes:
        recorded["latest"] = now
        recorded["changes"] = [*recorded.get("changes", []), *changes]
    return recorded, [
        f"{change}; lessons that are taught again may differ in their last digits" for change in changes
    ]


def _place(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def _probe(given: Rows | Path | str | None, settings: TeachSettings) -> Probe:
    if isinstance(given, str | Path):
        return read(Path(given), settings.probe_rows)
    if given is not None:
        for number, row in enumerate(given, start=1):
            if not {"prompt", "answer"} <= set(row):
                raise ConfigError(f"probe: row {number} lacks a prompt or an answer")
        return of_rows(given, settings.probe_rows)
    if settings.model == "nano":
        return of_nano(settings.probe_rows)
    kept = (NANO / FILE).read_text(encoding="utf-8").splitlines()
    return of_rows([json.loads(line) for line in kept], settings.probe_rows)


def _check_shape(tuned: Any, given: TeachSettings | Mapping[str, Any] | None, settings: TeachSettings) -> None:
    """ConfigError where a shape is asked for that a run's own adapter or soft prompt has already."""
    asked = given.model_fields_set if isinstance(given, TeachSettings) else set(given or {})
    name = "lora" if settings.tuning == "lora" else "soft_prompt"
    if tuned is not None and name in asked:
        raise ConfigError(
            f"{name}: what the run {settings.run} trained goes on, in its own shape; leave {name}.* out"
        )


def _check(folder: RunFolder, identity: Mapping[str, Any], probe: Rows | Path | str | None) -> None:
    """RunError where the folder holds something else, or lessons of another base, other settings, another probe."""
    if not folder.exists:
        if folder.path.is_dir() and any(path.name != ".lock" for path in folder.path.iterdir()):
            raise RunError(
                f"{folder.path} holds something that is no lessons; give an empty folder, or another one"
            )
        return
    there = folder.recorded()[IDENTITY]
    if [name for name in identity if there.get(name) != identity[name]] == ["probe"]:
        kept = folder.path / FILE
        own = f"the rows in {kept}" if kept.is_file() else "the default probe"
        other = (
            probe if isinstance(probe, str | Path) else "what is given" if probe is not None else "what there is"
        )
        raise RunError(
            f"{folder.path} was started otherwise: its probe is {own}, and {other} holds other rows. "
            "Leave the probe out to go on with its own, or give another folder"
        )
    folder.refuse_changed(changed_settings(there, json.loads(json.dumps(identity))))
