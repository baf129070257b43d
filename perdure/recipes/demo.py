"""The demo: three runs on the arena's five tasks, one table, one page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from perdure.recipes.run import execute, settings_for
from perdure.recipes.show import print_results, write_pages
from perdure.recipes.track import track_finished
from perdure.training.display import Terminal
from perdure.training.folder import RunFolder

STRATEGIES = ("naive", "replay", "joint")


def run_demo(out: Path, seed: int, overrides: Sequence[str], again: str, track: Sequence[str] = ()) -> None:
    """Train naive, replay and joint on nano; runs that are finished already are left as they are."""
    from perdure.training.plan import changed_settings, fixed_settings

    display = Terminal()
    start = time.perf_counter()
    folders = []
    for strategy in STRATEGIES:
        settings, base = settings_for(
            "arena-tasks", {"strategy": strategy, "seed": seed, "name": strategy}, overrides
        )
        folder = RunFolder(out / strategy)
        folders.append(folder.path)
        if folder.exists:
            folder.refuse_changed(changed_settings(fixed_settings(folder.settings()), fixed_settings(settings)))
        if folder.results.is_file():
            display.say(f"{folder.path}: finished already")
            track_finished(folder, track, display)
            continue
        execute(settings, base, folder, display, again, track)
    report = write_pages(folders, out / "report.html")
    print_results(folders, display, report)
    display.say(f"the demo took {time.perf_counter() - start:.0f} s")
