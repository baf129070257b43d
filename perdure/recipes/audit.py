"""Commands that show what a run did, and do its end again to prove it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perdure.errors import RunError, RunFailure
from perdure.order import fingerprint
from perdure.recipes.run import quieten
from perdure.storage import file_hash, there
from perdure.training.display import Quiet, Terminal
from perdure.training.folder import RunFolder


def audit_run(path: Path, keys: Sequence[str]) -> None:
    """Print where a run came from, its chain of checkpoints, and which rows it was trained on."""
    from perdure.training.audit import chain, seen

    folder = RunFolder(path)
    settings, recorded = folder.settings(), folder.recorded()
    say = Terminal().say
    if keys:
        rows = list(seen(folder, frozenset(keys)))
        for row in rows:
            say(
                f"{row.key}: task {row.task}, {row.stage}: trained on {row.trained} times, replayed {row.replayed} "
                f"times, steps {row.first} to {row.last}"
            )
        for key in keys:
            if key not in {row.key for row in rows}:
                say(
                    f"{key}: "
                    + (
                        "erased"
                        if fingerprint(key) in settings.erased
                        else "no finished stage was trained on it: held out, left out, or no row of this run"
                    )
                )
        return
    for command in recorded.get("commands", ()):
        say(f"command     {command}")
    say(f"model       {settings.model} ({settings.tuning}), strategy {settings.strategy}, seed {settings.seed}")
    for change in recorded.get("changes", ()):
        say(f"changed     after step {change['step']}: {change['setting']}")
    say("versions    " + ", ".join(f"{name} {number}" for name, number in recorded.get("versions", {}).items()))
    say("machine     " + ", ".join(f"{name} {value}" for name, value in recorded.get("machine", {}).items()))
    for task in (recorded.get("data") or {}).get("tasks", ()):
        for source, digest in task["sources"].items():
            changed = there(Path(source)) and Path(source).is_file() and file_hash(Path(source)) != digest
            say(f"data        {task['name']}: {source} {digest}" + (", and another file now" if changed else ""))
    totals: dict[str, list[int]] = {}
    for row in seen(folder):
        counts = totals.setdefault(row.stage, [0, 0, 0, 0])
        for i, value in enumerate((row.trained > 0, row.trained, row.replayed > 0, row.replayed)):
            counts[i] += value
    for stage, (rows_trained, trained, rows_replayed, replayed) in totals.items():
        say(
            f"rows        {stage}: {rows_trained} rows trained on, {trained} times; "
            f"{rows_replayed} rows replayed, {replayed} times"
        )
    if totals:
        say(f"            which and when: {folder.keys}, or --key")
    links = chain(folder)
    for link in links:
        say(
            f"checkpoint  {link.name}: "
            + (link.fault or f"step {link.step}, {' '.join(h[:16] for h in link.hashes)}")
        )
    if folder.erasures.is_file():
        say(f"erasures    {folder.erasures}" + ("; one was stopped, finish it" if folder.erasing else ""))
    say("state       " + ("finished" if folder.finished else "not finished"))
    broken = [link.name for link in links if link.fault]
    if broken:
        raise RunError(
            f"{path}: not whole: {', '.join(broken)} cannot be read; --resume goes on from the one before"
        )
    say("checked     every checkpoint is as it was written")


def verify_run(path: Path) -> None:
    """Train a run's last stage again and compare what comes out."""
    from perdure.training.audit import verify
    from perdure.training.plan import make_plan
    from perdure.training.run import Run

    folder = RunFolder(path)
    settings, base = folder.settings(), folder.recipe_folder
    changes = [
        f"{change['setting']} after step {change['step']}" for change in folder.recorded().get("changes", ())
    ]
    quieten()
    display = Terminal()
    display.say(f"{path}: training its last stage again, aside")
    start, differ = verify(
        folder,
        settings,
        lambda part: make_plan(part, base),
        lambda plan, copy: Run(plan, copy, Quiet()),
    )
    if differ:
        lines = [
            f"{name}: {there or 'not there'} in the run, {here or 'not there'} now"
            for name, (there, here) in differ.items()
        ]
        raise RunFailure(
            f"{path}: trained again from {start}, these files came out otherwise:\n  "
            + "\n  ".join(lines)
            + (
                "\nThe run went on with changed settings, which ends bit-exactness: " + "; ".join(changes)
                if changes
                else "\nAnother processor, number of threads or version of a library does that: `perdure audit`."
            )
        )
    display.say(f"{path}: trained again from {start}; final state, model and scores are the same bytes")
