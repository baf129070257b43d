"""The overview of learning reactions in a sequence, drawn: the workflow, and the MHAR head layer by layer."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from perdure.report.canvas import COLOURS, GREY, as_png, panels

WIDTH, HEIGHT = 10.0, 7.6  # inches, which are the drawing's coordinates too
INK = "#1f2937"
DATA, MODEL, HEAD, RESULT = "#eef2f7", "#dbeafe", "#d1fae5", "#fef3c7"
SHADES = ("#440154", "#31688e", "#35b779", "#fde725")  # of viridis: a low score to a high one
# Of the small matrix: a row after each task, a column a task, an index into SHADES.
SCORES = ((3, 0, 0, 0), (2, 3, 0, 0), (2, 2, 3, 1), (2, 2, 2, 3))
# What the head is made of, in the order of models/heads.py.
BODY = (
    "hidden states\n[tokens × width]",
    "rotary\nself-attention\n4 heads, no\ncausal mask,\npadding masked",
    "RMSNorm(x + ·)",
    "MLP: 3 linear\nlayers with\nSiLU between",
    "RMSNorm(x + ·)",
    "attention\npooling over\nreal tokens",
)
ANSWER = ("linear\n1,024", "dropout\n0.2", "RMSNorm", "SiLU", "linear\n1", "sigmoid", "yield\n0 to 1")


def draw_overview() -> Figure:
    """The workflow above, the head below; one unit is an inch."""
    figure, (ax,) = panels(1, WIDTH, HEIGHT)
    figure.set_layout_engine("none")
    ax.set_position((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")
    _heading(ax, 7.3, "Reactions arrive task by task; the model must predict the yields of all of them")
    _workflow(ax)
    ax.plot([0.3, WIDTH - 0.3], [3.5, 3.5], color="#d1d5db", linewidth=0.8)
    _heading(ax, 3.2, "MHAR head: multi-head attention regression")
    _head(ax)
    return figure


overview = as_png(draw_overview)


def _workflow(ax: Axes) -> None:
    for i, name in enumerate(("task 1", "task 2", "…", "task 15")):
        _box(ax, 0.3, 6.45 - 0.42 * i, 1.25, 0.34, name, DATA)
    _note(ax, 0.925, 6.95, "a task: the conditions of\none pair of reactants")
    _box(ax, 2.15, 5.35, 1.35, 1.1, "reaction\nSMILES\nas tokens", DATA)
    _box(ax, 4.1, 4.95, 1.85, 1.9, "", MODEL)
    _text(ax, 5.025, 6.62, "backbone", weight="bold")
    for i, (name, what) in enumerate(
        (("frozen", "states cached"), ("LoRA", "adapters train"), ("full", "all weights train"))
    ):
        _box(ax, 4.2, 6.02 - 0.47 * i, 1.65, 0.41, f"{name}: {what}", "white", size=7.5)
    _box(ax, 6.55, 5.35, 1.2, 1.1, "MHAR\nhead", HEAD, weight="bold")
    _box(ax, 8.35, 5.35, 1.35, 1.1, "yield\n0 to 100 %", RESULT)
    for x, end in ((1.6, 2.1), (3.55, 4.05), (6.0, 6.5), (7.8, 8.3)):
        _arrow(ax, (x, 5.9), (end, 5.9))
    _box(ax, 1.5, 3.8, 2.0, 0.75, "replay memory\nrows of earlier tasks", DATA)
    _arrow(ax, (0.925, 5.13), (1.45, 4.17), curve="angle,angleA=-90,angleB=180,rad=6")
    _arrow(ax, (2.82, 4.6), (2.82, 5.3))
    _note(ax, 0.75, 4.02, "after each\ntask", "right")
    _note(ax, 2.95, 4.95, "beside the\nnew rows", "left")
    side = 0.27
    for t, row in enumerate(SCORES):
        for i, shade in enumerate(row):
            ax.add_patch(
                Rectangle(
                    (8.45 + i * side, 4.55 - t * side), side, side, facecolor=SHADES[shade],
                    edgecolor="black" if i == t else "white", linewidth=1.2 if i == t else 0.6, zorder=3 + (i == t),
                )
            )  # fmt: skip
    _arrow(ax, (9.0, 5.3), (9.0, 4.9))
    _note(
        ax, 8.3, 4.28,
        "score matrix: R², RMSE and MAE\nof every task after each task,\non rows that were never trained on",
        "right",
    )  # fmt: skip


def _head(ax: Axes) -> None:
    widths = (1.3, 1.35, 1.3, 1.2, 1.3, 1.2)
    gap = (WIDTH - 0.6 - sum(widths)) / (len(widths) - 1)
    left, middle = [0.3], 2.13
    for width in widths[:-1]:
        left.append(left[-1] + width + gap)
    for i, (x, width, name) in enumerate(zip(left, widths, BODY, strict=True)):
        high = 1.15 if i == 1 else 0.7
        norm = name.startswith("RMSNorm")
        _box(ax, x, middle - high / 2, width, high, name, DATA if i == 0 else "white" if norm else HEAD, size=8)
        if i:
            _arrow(ax, (left[i - 1] + widths[i - 1] + 0.05, middle), (x - 0.05, middle))
    # x of "x + ·" passes by what is added to it.
    first, second = left[2] + 0.3 * widths[2], left[4] + 0.3 * widths[4]
    for start, to in ((left[0] + widths[0] / 2, first), (left[2] + 0.7 * widths[2], second)):
        top = 2.87
        ax.plot([start, start, to], [middle + 0.39, top, top], color=COLOURS[1], linewidth=1.2)
        _arrow(ax, (to, top), (to, middle + 0.4), COLOURS[1])
        _note(ax, (start + to) / 2, top + 0.01, "x", box=True)
    width, gap, y = 0.98, (WIDTH - 0.6 - 7 * 0.98) / 6, 0.35
    places = [0.3 + i * (width + gap) for i in range(len(ANSWER))]
    for i, (x, name) in enumerate(zip(places, ANSWER, strict=True)):
        _box(ax, x, y, width, 0.62, name, RESULT if i == len(ANSWER) - 1 else HEAD, size=8)
        if i:
            _arrow(ax, (places[i - 1] + width + 0.05, y + 0.31), (x - 0.05, y + 0.31))
    # From the end of the upper row to the beginning of the lower one.
    end, turn = left[-1] + widths[-1] / 2, 1.25
    ax.plot([end, end, 0.79], [middle - 0.4, turn, turn], color=GREY, linewidth=1.2)
    _arrow(ax, (0.79, turn), (0.79, y + 0.67))


def _box(
    ax: Axes, x: float, y: float, width: float, height: float, text: str, colour: str,
    *, size: float = 9, weight: str = "normal",
) -> None:  # fmt: skip
    """A box with its lower left corner at x, y."""
    style = "round,pad=0,rounding_size=0.06"
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=GREY, linewidth=0.9)
    )
    if text:
        _text(ax, x + width / 2, y + height / 2, text, size=size, weight=weight)


def _text(ax: Axes, x: float, y: float, text: str, *, size: float = 9, weight: str = "normal") -> None:
    ax.text(x, y, text, ha="center", va="center", fontsize=size, weight=weight, color=INK, linespacing=1.25)


def _note(ax: Axes, x: float, y: float, text: str, side: str = "center", *, box: bool = False) -> None:
    """Small words beside what they tell of."""
    back = {"facecolor": "white", "edgecolor": "none", "pad": 1.5} if box else None
    ax.text(
        x, y, text, ha=side, va="center", fontsize=7.5, color="#4b5563", style="italic", linespacing=1.25, bbox=back
    )  # fmt: skip


def _heading(ax: Axes, y: float, text: str) -> None:
    ax.text(0.3, y, text, ha="left", va="center", fontsize=11, weight="bold", color=INK)


def _arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY, curve: str = "arc3"
) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=10, color=colour, linewidth=1.2, shrinkA=0, shrinkB=0,
            connectionstyle=curve,
        )
    )  # fmt: skip
