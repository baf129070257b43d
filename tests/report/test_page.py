"""The page: one file, everything escaped, nothing from outside; and the plots of a run folder."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from perdure.errors import RunError, StorageError
from perdure.report import write_plots, write_report

EVIL = "<script>alert(1)</script>"


class Tags(HTMLParser):
    """Collects tags with their attributes, and checks that they nest."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def text_of(page):
    return re.sub(r"data:image/png;base64,[\w+/=]+", "", page.read_text("utf-8"))


def test_one_run(make_run, tmp_path):
    page = write_report([make_run()], tmp_path / "report.html")
    text = text_of(page)
    tags = Tags(text).tags
    assert sum(tag == "img" for tag, _ in tags) == 9
    assert all(attrs["alt"] for tag, attrs in tags if tag == "img")
    assert "naive&#39;s exact match ended 45.0 points below each earlier task&#39;s best" in text
    assert "forgetting ↓" in text
    assert "lower is better" in text
    assert "1,000 (25.0 %)" in text
    assert "seed: 0" in text
    assert "config.yaml" in text
    assert os.listdir(tmp_path / "runs" / "naive").count("report.html") == 0
    assert not (tmp_path / "comparison.png").exists()


def test_several_runs_side_by_side(make_run, tmp_path):
    shares = {"rows": 123, "row_share": 0.1, "targets": 4567, "target_share": 0.5}
    one = {"metrics": ("exact_match",)}
    runs = [
        make_run(**one),
        make_run("replay", replay=shares, memory=64, **one),
        make_run("joint", joint=True, **one),
    ]
    text = text_of(write_report(runs, tmp_path))
    assert "kept 67 % of joint&#39;s average" in text
    assert all(part in text for part in ("4,567", "50.0 %", "<td>64</td>", "Settings of joint"))
    assert text.count("Rows of each task") == 1  # the three share their data
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("undrawn")
def test_exact_match_comes_first_where_any_run_has_it(make_run, tmp_path):
    runs = [make_run("text", metrics=("loss",), main_metric="loss"), make_run("asked", main_metric="exact_match")]
    text = text_of(write_report(runs, tmp_path / "report.html"))
    assert text.index("<h2>Exact match") < text.index("<h2>Loss")


def f1_of_one_task(row, column, metric, joint):
    """F1 of the second task alone: 10 %, 30 % after the first, 80 % when learnt. The others lose 0.3 a stage."""
    if metric == "f1":
        return math.nan if column == 0 else (0.1, 0.3, 0.8)[2 if joint and row else row]
    trained = 1 if joint else column + 1
    value = 0.1 if row < trained else 0.9 - 0.3 * (row - trained)
    return value if metric == "exact_match" else 4 * (1 - value)


def test_a_metric_that_one_task_alone_has(make_run, tmp_path):
    """Means are over that task, and are no zeros; what was never measured is a dash. Exact match leads.

    F1 is 10 %, 30 %, 80 %: average and learning accuracy are 80 %, the anytime average too, since after "math" no
    task that was trained has it; forward transfer is 30 − 10 points. Nothing was scored after it was learnt.
    """
    one = {"tasks": ("math", "hotpot"), "metrics": ("exact_match", "f1"), "scored": f1_of_one_task}
    joint = make_run("joint", joint=True, main_metric="exact_match", **one)
    text = text_of(write_report([make_run(main_metric="exact_match", **one), joint], tmp_path / "report.html"))
    assert text.index("<h2>Exact match <") < text.index("<h2>F1 <") < text.index("What the columns mean")
    section = text[text.index("<h2>F1 <") : text.index("What the columns mean")]
    assert re.findall(r'alt="(.*?):', section) == ["Score matrix", "Scores over the stream", "Pairwise transfer"]
    assert '<th scope="row">naive</th><td>80.0 %</td><td>80.0 %</td><td>80.0 %</td><td>20.0 pt</td>' in section
    assert '<th scope="row">joint</th><td>80.0 %</td><td>80.0 %</td><td>–</td><td>–</td>' in section
    dashes = "<td>–</td>" * 4
    assert f'<th scope="row">math</th><td>naive</td><td>100</td>{dashes}' in section
    scores = "<td>10.0 %</td><td>80.0 %</td><td>80.0 %</td><td>–</td>"
    assert f'<th scope="row">hotpot</th><td>naive</td><td>100</td>{scores}' in section
    assert "nan" not in re.sub(r'src="[^"]*"', "", section)
    (first, *_) = re.findall(r"<li>(.*?)</li>", text)
    assert first.startswith("naive&#39;s exact match ended 30.0 points below")


@pytest.mark.usefixtures("undrawn")
def test_one_name_for_one_thing(make_run, tmp_path):
    text = text_of(write_report([make_run()], tmp_path / "report.html"))
    for head in ("learning accuracy ↑", "anytime average ↑", "when learnt ↓", "anytime average ↓"):
        assert f">{head}</th>" in text
    assert "<dt>anytime average</dt>" in text
    assert "along the way" not in text
    assert "learning accuracy ↓" not in text


@pytest.mark.usefixtures("undrawn")
def test_the_probe_is_whatever_the_settings_name(make_run, tmp_path):
    text = text_of(write_report([make_run()], tmp_path / "report.html"))
    assert "could do before, which no task trains" not in text
    assert "questions or plain text" in text
    assert "even when it is joint" in text


@pytest.mark.usefixtures("undrawn")
def test_skipped_steps_come_first(make_run, tmp_path):
    text = text_of(write_report([make_run(EVIL, skipped=7, folder="x")], tmp_path / "report.html"))
    warning = '<p class="warning">&lt;script&gt;alert(1)&lt;/script&gt;: 7 of 30 steps were skipped'
    assert text.index(warning) < text.index('<ul class="lead">')
    assert 'class="warning"' not in text_of(write_report([make_run(skipped=0)], tmp_path / "report.html"))


@pytest.mark.usefixtures("undrawn")
def test_runs_that_were_scored_on_other_rows_are_told_apart(make_run, tmp_path):
    """Of task a the second run has other rows, of b the third says nothing; alone none is warned of."""
    one, two = ({"a": x, "b": "same", "c": "same"} for x in ("1", "2"))
    runs = [make_run("one"), make_run("two"), make_run("old")]
    for path, scored in zip(runs, (one, two, None), strict=True):
        results = json.loads((path / "results.json").read_text())
        (path / "results.json").write_text(json.dumps({**results, **({"scored": scored} if scored else {})}))
    page = text_of(write_report(runs, tmp_path / "report.html"))
    assert '<p class="warning">Not to be compared: one | two were scored on other rows of a.' in page
    assert "Not to be compared" not in text_of(write_report([runs[0], runs[2]], tmp_path / "two.html"))


@pytest.mark.usefixtures("undrawn")
def test_rows_of_each_task(make_run, tmp_path):
    """The counts as results.json has them; who has few rows to be scored on is named."""
    data = {
        "a": {"train": 300, "evaluation": 1200, "duplicates": 11},
        EVIL: {"train": 300, "evaluation": 4},
        "c": {"train": 300, "evaluation": 0, "duplicates": 0},
    }
    page = write_report([make_run(tasks=("a", EVIL, "c"), data=data)], tmp_path / "report.html")
    text = text_of(page)
    assert '<th scope="row">a</th><td>300</td><td>1,200</td><td>11</td>' in text
    assert '<th scope="row">a</th><td>1,200</td><td>10.0 %</td>' in text  # rows, then exact match before training
    assert "&lt;script&gt;alert(1)&lt;/script&gt; has 4 evaluation rows: each is 25.0 % of its score." in text
    assert "c has no evaluation rows" in text
    assert "Duplicates: further rows" in text


@pytest.mark.usefixtures("undrawn")
def test_a_column_has_one_number_of_decimals(make_run, tmp_path):
    """Losses of 12.5 before, 0.0001 when learnt and at the end: three decimals for all."""

    def scored(row, column, metric, joint):
        return 0.0001 if row else 12.5

    runs = [make_run(name, joint=True, metrics=("loss",), scored=scored) for name in ("one", "two")]
    text = text_of(write_report(runs, tmp_path / "report.html"))
    assert "<td>12.500</td><td>0.000</td><td>0.000</td><td>–</td>" in text
    assert "e-04" not in text


@pytest.mark.usefixtures("undrawn")
def test_what_can_only_show_zeros_is_not_drawn(make_run, tmp_path):
    """Exact match 0 throughout: the loss alone has figures. Of joint training no forgetting is drawn."""

    def scored(row, column, metric, joint):
        return 1.0 + row if metric == "loss" else 0.0

    runs = [make_run("one", scored=scored), make_run("two", scored=scored), make_run("joint", joint=True)]
    for some, figures in ((runs[:1], 5), (runs[:2], 6), (runs[2:], 5), (runs, 8)):
        text = text_of(write_report(some, tmp_path / "report.html"))
        assert text.count("<img") == figures, figures
        assert ("so there is nothing to draw" in text) == (runs[2] not in some)
    write_report(runs[:2], tmp_path / "report.html")
    assert 'alt="The runs compared: loss of one, two.' in text_of(write_report(runs[:2], tmp_path))
    assert {path.name for path in write_plots(runs[0])} == {
        "matrix_loss.png", "curves_loss.png", "forgetting_loss.png", "transfer_loss.png", "training_loss.png",
    }  # fmt: skip
    plots = runs[2] / "plots"
    plots.mkdir()
    older = ("forgetting_loss.png", "transfer_loss.png", "matrix_loss_inferred.png", "drift.png", "usage.png")
    for name in (*older, "mine.png"):
        (plots / name).touch()
    assert not any(path.name in older for path in write_plots(runs[2]))
    assert (plots / "mine.png").exists()
    assert not any((plots / name).exists() for name in older)


def test_everything_from_data_is_escaped(make_run, tmp_path):
    run = make_run(
        EVIL, [EVIL, '"><img src=x onerror=alert(2)>', "{{ 7 * 7 }}"], folder="evil", config=f"a: {EVIL}\n",
        metrics=(EVIL,),
        model=EVIL, command=EVIL, versions={EVIL: EVIL}, data={EVIL: {EVIL: EVIL}},
    )  # fmt: skip
    text = text_of(write_report([run], tmp_path / "report.html"))
    tags = Tags(text).tags
    assert not any(tag in ("script", "iframe", "link", "object") for tag, _ in tags)
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
    assert all(attrs["src"] == "" for tag, attrs in tags if tag == "img")  # data URIs, taken out above
    assert EVIL not in text
    assert "{{ 7 * 7 }}" in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10


def test_nothing_is_fetched(make_run, tmp_path):
    text = text_of(write_report([make_run(metrics=("loss",))], tmp_path / "report.html"))
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_an_unfinished_run_and_an_empty_one(make_run, tmp_path):
    text = text_of(write_report([make_run("part", results=False)], tmp_path / "part.html"))
    assert "part is not finished" in text
    assert "not finished</td>" in text
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").touch()
    assert "Nothing was measured yet" in text_of(write_report([empty], tmp_path / "empty.html"))
    assert write_plots(empty) == []


@pytest.mark.usefixtures("undrawn")
def test_a_probe_taken_once_has_no_end(make_run, tmp_path):
    page = write_report([make_run(metrics=("loss",), probe={"loss": [2.0]})], tmp_path / "report.html")
    assert "<td>loss</td><td>2.000</td><td>–</td><td>–</td>" in text_of(page)


def test_equal_runs_give_equal_pages(make_run, tmp_path):
    run = make_run(metrics=("loss",))
    pages = [write_report([run], tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_plots_go_into_the_run_folder(make_run):
    run = make_run()
    paths = write_plots(run)
    assert [path.relative_to(run).as_posix() for path in paths] == [
        *(f"plots/{kind}_exact_match.png" for kind in ("matrix", "curves", "forgetting", "transfer")),
        *(f"plots/{kind}_loss.png" for kind in ("matrix", "curves", "forgetting", "transfer")),
        "plots/training_loss.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert sorted(os.listdir(run / "plots")) == sorted(path.name for path in paths)


def test_a_page_with_plots_that_are_drawn_draws_none_again(told_run, monkeypatch, tmp_path):
    """The same bytes as of a page that draws its own; of several runs every figure is another one."""
    from matplotlib.figure import Figure

    from perdure.report.page import Drawn

    run, drawn = told_run(), Drawn()
    alone = write_report([run], tmp_path / "alone.html").read_bytes()
    write_plots(run, drawn)
    save, saved = Figure.savefig, []
    monkeypatch.setattr(Figure, "savefig", lambda *given, **options: saved.append(1) or save(*given, **options))
    assert write_report([run], tmp_path / "page.html", drawn).read_bytes() == alone
    assert saved == []
    write_report([run, told_run("pnn")], tmp_path / "both.html", drawn)
    assert len(saved) > 3


def test_a_run_that_is_told_tasks_stands_twice(make_run, told_run, tmp_path):
    """Told 90 % at the end, inferred 45 %; the inferred metrics have no section of their own."""
    run = told_run()
    text = text_of(write_report([run, make_run()], tmp_path))
    assert "<h2>Exact match <" in text
    assert "inferred <small>" not in text
    row = '<th scope="row">packnet (task {})</th><td>{} %</td>'
    assert row.format("told", "90.0") in text
    assert row.format("inferred", "45.0") in text
    assert '<th scope="row">naive</th><td>60.0 %</td>' in text
    assert '<th scope="row">a</th><td>packnet (task inferred)</td><td>100</td><td>5.0 %</td><td>45.0 %</td>' in text
    assert "<td>told, and inferred</td>" in text
    assert "<td>not needed</td>" in text
    assert "packnet: the strategy answers by task." in text
    assert 'alt="The runs compared: exact match of packnet (task told), packnet (task inferred), naive.' in text


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_is_told_tasks_has_no_files_of_inferred_metrics(make_run, told_run, tmp_path):
    assert not any("inferred" in path.name for path in write_plots(told_run()))
    alone = text_of(write_report([make_run("plain")], tmp_path / "alone.html"))
    assert "answers by task" not in alone
    assert "task of a row" not in alone


@pytest.mark.usefixtures("undrawn")
def test_what_is_inferred_as_it_is_told_is_drawn_once(told_run, tmp_path):
    def scored(row, column, metric, joint):
        return 0.5 if metric.startswith("exact_match") else 1.0

    text = text_of(write_report([told_run(scored=scored)], tmp_path / "report.html"))
    assert 'alt="Score matrix: exact match of packnet (task told or inferred).' in text
    assert text.count('<th scope="row">packnet (task inferred)</th><td>50.0 %</td>') == 1


@pytest.mark.usefixtures("undrawn")
def test_a_regression_is_told_and_not_inferred(told_run, tmp_path):
    text = text_of(write_report([told_run(metrics=("loss",), main_metric="loss")], tmp_path / "report.html"))
    assert '<th scope="row">packnet (task told)</th>' in text
    assert "It was told the task of each row." in text
    assert "<td>told</td>" in text


@pytest.mark.usefixtures("undrawn")
def test_drift_and_usage(make_run, told_run, tmp_path):
    run = told_run()
    text = text_of(write_report([run], tmp_path / "report.html"))
    assert "<h2>Weights</h2>" in text
    assert '<th scope="row">a</th><td>300</td><td>0</td><td>10.0 %</td><td>10.0 %</td>' in text
    assert '<th scope="row">c</th><td>350</td><td>50</td><td>20.0 %</td><td>40.0 %</td>' in text
    assert text.count("Share of each layer&#39;s weights by task") == 1
    assert {"drift.png", "usage.png"} <= {path.name for path in write_plots(run)}
    both = text_of(write_report([run, told_run("pnn"), make_run()], tmp_path / "both.html"))
    assert '<th scope="row">pnn</th><td>350</td><td>50</td><td>40.0 %</td>' in both
    assert both.count("Share of each layer&#39;s weights by task") == 2
    assert "Weights</h2>" not in text_of(write_report([make_run("plain")], tmp_path / "plain.html"))


@pytest.mark.usefixtures("undrawn")
def test_drift_of_an_unfinished_run_is_in_its_log(told_run, tmp_path):
    run = told_run(results=False)
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"event": "drift", "step": 10, "task": "a", "stage": 1, "total": {"weights": 7, "new": 0, ')
        log.write(
            '"relative_change": 0.5, "relative_change_from_start": 0.5}, "groups": {"net": {"weights": 7}}}\n'
        )
    text = text_of(write_report([run], tmp_path / "report.html"))
    assert '<th scope="row">a</th><td>7</td><td>0</td><td>50.0 %</td><td>50.0 %</td>' in text


@pytest.mark.usefixtures("undrawn")
def test_mistakes_are_told_in_words(make_run, tmp_path, monkeypatch):
    run = make_run(metrics=("loss",))
    page = write_report([run], tmp_path / "report.html")
    before = page.read_bytes()
    with pytest.raises(RunError, match="does not exist"):
        write_report([run, tmp_path / "nowhere"], page)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"could not write .*report\.html: No space left"):
        write_report([run], page)
    assert page.read_bytes() == before


def test_a_report_needs_no_model_and_its_import_no_plots():
    """Neither torch nor perdure's other rooms are imported; matplotlib only when something is drawn."""
    code = (
        "import sys, perdure.report; "
        "assert not {'torch', 'transformers', 'matplotlib', 'jinja2', 'numpy'} & set(sys.modules); "
        "import perdure.report.plots; "
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules; "
        "rooms = {m.split('.')[1] for m in sys.modules if m.startswith('perdure.')}; "
        "assert rooms <= {'report', 'errors', 'types'}, rooms"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
