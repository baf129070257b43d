"""The command that draws histories side by side: which files, and where the picture goes."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from perdure.errors import DataError, UsageError
from perdure.storage import there, write_bytes

DEFAULT = Path("forgetting_history_plot.png")
KINDS = ("png", "pdf", "svg")


def plot(patterns: Sequence[str], out: Path | None) -> None:
    """Draw the histories that files and globs name, into `out`, or in a window, or without a screen into DEFAULT.

    Raises:
        UsageError: `out` is no picture's name.
        DataError: a file is missing or no history; all of them are named.
        StorageError: the picture cannot be written; an earlier one is intact.
    """
    target = None if out is None else picture_name(out)
    files = files_of(patterns)

    from perdure.report.histories import combined_as, draw_combined
    from perdure.report.history import read_histories
    from perdure.report.window import has_screen, show

    histories = read_histories(files)
    if target is None and has_screen() and show(lambda: draw_combined(histories), "perdure plot"):
        return
    target = target or DEFAULT
    write_bytes(target, combined_as(histories, target.suffix.lower().removeprefix(".")))
    print(f"figure: {target}")


def picture_name(out: Path) -> Path:
    """The picture's path, with .png where it has no ending.

    Raises:
        UsageError: a folder, or an ending that is no format.
    """
    if out.is_dir():
        raise UsageError(f"-o {out} is a folder; name a file in it, for instance {out / DEFAULT}")
    if not out.suffix:
        return picture_name(out.with_name(f"{out.name}.png"))
    if out.suffix.lower().removeprefix(".") not in KINDS:
        raise UsageError(f"-o {out}: no picture ends in {out.suffix}; choose from {', '.join(KINDS)}")
    return out


def files_of(patterns: Sequence[str]) -> list[Path]:
    """The files that arguments name, in their order, each once; a glob's matches are sorted, its folders left out.

    Raises:
        DataError: a file does not exist or is a folder, or a glob matches no file; all of them are named.
    """
    files: dict[Path, Path] = {}
    wrong = []
    for pattern in patterns:
        # A file may have a glob's characters in its name.
        literal = there(Path(pattern)) or not glob.has_magic(pattern)
        found = [Path(pattern)] if literal else [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
        found = [path for path in found if literal or not path.is_dir()]
        if not found:
            wrong.append(f"{pattern} matches no file")
        elif literal and not there(found[0]):
            wrong.append(f"{pattern}: no such file")
        elif literal and found[0].is_dir():
            wrong.append(
                f"{pattern} is a folder; name its files, for instance {Path(glob.escape(pattern), '*.json')}"
            )
        else:
            for path in found:
                files.setdefault(path.resolve(), path)
    if wrong:
        head = f"{len(wrong)} arguments name no file:\n  " if len(wrong) > 1 else ""
        raise DataError(head + "\n  ".join(wrong))
    return list(files.values())
