"""The figure of a strategy's capacity: what its bars show, any number of layers and tasks, nothing outside."""

from __future__ import annotations

import io

import pytest
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from perdure.report import usage
from perdure.report.canvas import style

BLOCK = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def layers(count, tasks, parts=BLOCK):
    owned = {f"task {t}": 10 * (t + 1) for t in range(tasks)}
    return {f"model.layers.{i}.{part}": {**owned, "free": 100} for i in range(count) for part in parts}


def bars(figure):
    """The widths of each row's bars, from the top."""
    (ax,) = figure.axes
    rows = {}
    for patch in ax.patches:
        assert isinstance(patch, Rectangle)
        rows.setdefault(round(patch.get_y(), 3), []).append(patch.get_width())
    return [rows[y] for y in sorted(rows)]


def test_bars_are_shares_of_a_layer_and_all_layers_come_first():
    """10 of 40 and 30 of 160 are 40 of 200 together; free ones come last whatever their place."""
    given = {"conv": {"a": 10, "free": 20, "b": 10}, "out": {"a": 30, "free": 130, "b": 0}}
    with style():
        figure = usage._draw(given)
        assert bars(figure) == [
            pytest.approx([0.2, 0.05, 0.75]),
            pytest.approx([0.25, 0.25, 0.5]),
            pytest.approx([0.1875, 0, 0.8125]),
        ]
        (ax,) = figure.axes
        assert [text.get_text() for text in ax.get_yticklabels()] == ["all layers", "conv", "out"]
        legend = figure.legends[0]
        assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "free"]
        shown = {text.get_text() for text in ax.texts}
        assert {"200", "40", "160", "20", "25", "75"} <= shown
        assert "0" not in shown


def test_blocks_of_a_deep_network_are_added_up():
    """40 blocks of four layers make four bars; 10, 20 and 100 of 130 in each."""
    with style():
        figure = usage._draw(layers(40, 2))
        names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        assert names == ["all layers", *(f"*.{part}" for part in BLOCK)]
        assert bars(figure) == [pytest.approx([10 / 130, 20 / 130, 100 / 130])] * 5


@pytest.mark.parametrize(
    "given",
    [
        layers(1, 1, ("out",)),
        layers(8, 9),
        layers(3, 25),
        {f"a layer with quite a long name, number {i}": {"cost $5 & $6_{x": 10**9, "free": 1} for i in (1, 2)},
        {"empty": {"a": 0, "free": 0}},
    ],
    ids=["one", "nine tasks", "25 tasks", "long names", "no weights"],
)  # fmt: skip
def test_no_text_leaves_the_picture(given):
    with style():
        figure = usage._draw(given)
        figure.canvas.draw()
        page = figure.bbox.padded(1)
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
        for text in texts:
            box = text.get_window_extent()
            assert page.contains(box.x0, box.y0), text.get_text()
            assert page.contains(box.x1, box.y1), text.get_text()


def test_the_figure_is_a_picture_and_the_same_each_time():
    first = usage.usage_figure(layers(2, 3))
    assert imread(io.BytesIO(first), format="png").ndim == 3
    assert first == usage.usage_figure(layers(2, 3))
