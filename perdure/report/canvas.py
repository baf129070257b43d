"""What all figures share: size, colours, panels, the bytes of a PNG. No pyplot: no global state and no window."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

DPI = 150
# In inches; a figure no wider than this stays readable when a web page shows it 800 pixels wide.
MAX_WIDTH = 10.0
# Okabe and Ito's palette, which people with colour blindness can tell apart, without its pale yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#6b7280"

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # Names come from data: a dollar sign in them is no formula.
    "text.parse_math": False,
    "text.usetex": False,
    # Hinting thins the crossbars and bowls of small glyphs, until sans digits look like those of a serif face.
    "text.hinting": "no_hinting",
    "axes.unicode_minus": True,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw with these settings, whatever the user's own matplotlib settings are."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name in a script that the font lacks shows as boxes; that is no reason to warn, or to fail a run.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*missing")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def line_style(index: int) -> dict[str, Any]:
    """How the line of one task or run is drawn: colours first, then dashes, so that 21 stay apart."""
    n = len(COLOURS)
    return {
        "color": COLOURS[index % n],
        "linestyle": DASHES[index // n % len(DASHES)],
        "marker": MARKERS[index % n],
        "markersize": 4,
    }


def panels(
    num: int, width: float, height: float | Sequence[float], *, extra: float = 0.0, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with `num` panels of that size in inches, as many beside one another as fit, and no empty frame.

    Args:
        num: how many panels.
        width: of one panel; a lone panel may be wider than MAX_WIDTH, and then the figure is.
        height: of one panel, or of each; a row is as high as its highest.
        extra: inches kept on the right for a legend.
        options: passed to `Figure.subplots` (sharex, sharey).
    """
    columns = max(1, min(num, int((MAX_WIDTH - extra) / width + 0.05)))
    rows = -(-num // columns)
    columns = -(-num // rows)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.05)
    heights = [height] * num if isinstance(height, int | float) else height
    tall = [max(heights[i * columns : (i + 1) * columns]) for i in range(rows)]
    figure = Figure(figsize=(columns * width + extra, sum(tall)), layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=tall, **options)
    flat = list(axes.flat)
    for unused in flat[num:]:
        unused.remove()
    return figure, flat[:num]


def as_png(draw: Callable[..., Figure]) -> Callable[..., bytes]:
    """A function that draws, as one that gives the picture's bytes, in this module's style."""

    @wraps(draw)
    def figure(*arguments: object) -> bytes:
        with style():
            return png(draw(*arguments))

    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG; the same figure gives the same bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def headline(figure: Figure, text: str) -> None:
    """Lines on top that say what is shown, broken where the figure ends."""
    characters = max(20, int(figure.get_figwidth() / 0.072))
    lines = [textwrap.fill(line, characters) for line in text.split("\n")]
    figure.suptitle("\n".join(lines), fontsize=9, color="#374151")
