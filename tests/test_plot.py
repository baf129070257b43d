"""`perdure plot`: which files it draws, in what order, where the picture goes, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import matplotlib
import pytest
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg

from perdure.errors import UsageError
from perdure.recipes.plot import files_of, picture_name
from perdure.report import histories, window


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with histories, no screen."""
    monkeypatch.chdir(tmp_path)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    for path, loss in (
        ("runs/b.json", 1.0),
        ("runs/a.json", 2.0),
        ("runs/deep/er/c.json", 3.0),
        ("d[1].json", 4.0),
    ):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"name": path, "steps": [0, 5], "math_loss": [loss, loss]}))
    Path("runs/folder.json").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["runs/b.json", "runs/a.json"], ["runs/b.json", "runs/a.json"]),
        (["runs/*.json"], ["runs/a.json", "runs/b.json"]),
        (["runs/b.json", "runs/*.json", "./runs/../runs/a.json"], ["runs/b.json", "runs/a.json"]),
        (["**/*.json"], ["d[1].json", "runs/a.json", "runs/b.json", "runs/deep/er/c.json"]),
        (["runs/**"], ["runs/a.json", "runs/b.json", "runs/deep/er/c.json"]),
        (["d[1].json", "runs/[ab].json"], ["d[1].json", "runs/a.json", "runs/b.json"]),
        (["runs/?.json"], ["runs/a.json", "runs/b.json"]),
    ],
)
def test_arguments_are_files_or_globs(arguments: list[str], files: list[str]) -> None:
    assert [path.as_posix() for path in files_of(arguments)] == files


def test_a_link_to_a_file_is_that_file() -> None:
    Path("link.json").symlink_to("runs/a.json")
    assert files_of(["link.json", "runs/a.json"]) == [Path("link.json")]


def test_a_picture_is_saved_where_no_screen_is(perdure: Callable[..., Any]) -> None:
    done = perdure("plot", "runs/*.json")
    assert (done.code, done.out, done.err) == (0, "figure: forgetting_history_plot.png\n", "")
    assert Path("forgetting_history_plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "out", "written", "beginning"),
    [
        ("-o", "new/folder/all", "new/folder/all.png", b"\x89PNG"),
        ("--out", "all.SVG", "all.SVG", b"<?xml"),
        ("--output", "all.pdf", "all.pdf", b"%PDF"),
    ],
)
def test_the_picture_is_named(
    option: str,
    out: str,
    written: str,
    beginning: bytes,
    perdure: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a name no window is opened, also where there is a screen."""
    monkeypatch.setattr(window, "has_screen", lambda: pytest.fail("no window was asked for"))
    done = perdure("plot", option, out, "runs/a.json")
    assert (done.code, done.out) == (0, f"figure: {written}\n")
    assert Path(written).read_bytes().startswith(beginning)
    assert sorted(path.name for path in Path(written).parent.iterdir() if path.name.startswith(".")) == []


def test_runs_stand_in_the_order_of_the_arguments(
    perdure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(histories, "combined_as", lambda runs, kind: seen.extend(r.name for r in runs) or b"")
    assert perdure("plot", "runs/deep/**/c.json", "runs/*.json", "runs/b.json").code == 0
    assert seen == ["runs/deep/er/c.json", "runs/a.json", "runs/b.json"]


def test_what_names_no_file_is_refused_together(perdure: Callable[..., Any], here: Path) -> None:
    done = perdure("plot", "gone.json", "runs/*.csv", "runs", "runs/a.json", "no\0file")
    assert done.code == 2
    assert done.err == (
        "error: 4 arguments name no file:\n  gone.json: no such file\n  runs/*.csv matches no file\n"
        "  runs is a folder; name its files, for instance runs/*.json\n  no\0file: no such file\n"
    )
    assert perdure("plot", "runs/folder*").err == "error: runs/folder* matches no file\n"
    assert perdure("plot").code == 2
    assert not list(here.glob("*.png"))


def test_files_that_are_no_histories_are_refused_together(perdure: Callable[..., Any], here: Path) -> None:
    Path("x.json").write_text("{}")
    Path("y.json").write_text("no")
    done = perdure("plot", "[xy].json", "runs/a.json")
    assert done.code == 2
    assert done.err.startswith("error: 2 files are no histories:\n  x.json: no history: ")
    assert "\n  y.json: not JSON: " in done.err
    assert not list(here.glob("*.png"))


def test_names_that_no_picture_can_have(perdure: Callable[..., Any]) -> None:
    done = perdure("plot", "-o", "all.json", "gone.json")
    assert (done.code, done.err) == (2, "error: -o all.json: no picture ends in .json; choose from png, pdf, svg\n")
    for name in ("runs", "", "runs/folder.json"):
        with pytest.raises(UsageError, match="is a folder; name a file in it"):
            picture_name(Path(name))
    assert picture_name(Path(".hidden")) == Path(".hidden.png")


def test_a_picture_that_cannot_be_written(perdure: Callable[..., Any]) -> None:
    done = perdure("plot", "-o", "runs/a.json/all.png", "runs/b.json")
    assert done.code == 1
    assert done.err.startswith("error: runs/a.json/all.png: could not be written")


# Windows


class Manager(FigureManagerBase):
    """Opens nothing: notes what was asked for."""

    asked: ClassVar[list[Any]] = []
    refuses = False

    def __init__(self, canvas: Any, num: int | str) -> None:
        if self.refuses:
            raise RuntimeError("no screen")
        super().__init__(canvas, num)

    def set_window_title(self, title: str) -> None:
        self.asked.append(title)

    def show(self) -> None:
        self.asked.append(self.canvas.figure)

    @classmethod
    def start_main_loop(cls) -> None:
        cls.asked.append(matplotlib.rcParams["text.parse_math"])


class Canvas(FigureCanvasAgg):
    required_interactive_framework = "fake"
    manager_class = Manager


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Manager]]:
    """A screen, and a backend for it."""
    import matplotlib.pyplot as plt

    backend: Any = ModuleType("perdure_fake_backend")
    backend.FigureCanvas, backend.FigureManager = Canvas, Manager
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    monkeypatch.setattr("matplotlib.cbook._get_running_interactive_framework", lambda: None)
    monkeypatch.setattr(Manager, "asked", [])
    plt.switch_backend(f"module://{backend.__name__}")
    yield Manager
    plt.switch_backend("agg")


def test_a_window_shows_the_figure_where_a_screen_is(
    screen: type[Manager], perdure: Callable[..., Any], here: Path
) -> None:
    """The window has its title, the figure with a line for each run, and the package's style while it is open."""
    import matplotlib.pyplot as plt

    done = perdure("plot", "runs/*.json")
    assert (done.code, done.out, done.err) == (0, "", "")
    _, title, figure, math_is_parsed = screen.asked  # the first is the title that every window begins with
    assert title == "perdure plot"
    assert [ax.get_title() for ax in figure.axes] == ["MATH loss"]
    assert len(figure.axes[0].lines) == 2
    assert not math_is_parsed
    assert not plt.get_fignums()
    assert not list(here.glob("*.png"))


def test_a_picture_is_saved_where_no_window_opens(
    screen: type[Manager], perdure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "refuses", True)
    done = perdure("plot", "runs/*.json")
    assert (done.code, done.out, done.err) == (0, "figure: forgetting_history_plot.png\n", "")
    assert screen.asked == []


def test_a_screen_needs_a_display_and_a_toolkit(screen: type[Manager], monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    assert window.has_screen()
    monkeypatch.delenv("WAYLAND_DISPLAY")
    assert not window.has_screen()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert window.has_screen()
    plt.switch_backend("agg")
    assert not window.has_screen()
