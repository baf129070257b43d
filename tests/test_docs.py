"""The documents against the code: examples run, commands parse, links lead somewhere, the file tree is the tree."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from perdure import ContinualTrainer, memory, strategies
from perdure.cli import _guarded, app
from perdure.recipes.catalogue import catalogue
from perdure.recipes.find import shipped
from perdure.recipes.run import settings_for
from perdure.strategies import STRATEGIES
from perdure.strategies.build import ALIASES, settings_of
from perdure.streams.spec import StreamSpec, TaskSpec, TemplateSpec
from perdure.training.plan import STREAM_MODES
from perdure.training.settings import RunSettings

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")])
RUN = (
    "README.md",
    "docs/python.md",
    "docs/concepts.md",
    "docs/memory.md",
    "docs/strategies/index.md",
    "docs/tracking.md",
)
# Results and pictures come from runs on real hardware: a clone may lack them.
MAY_BE_MISSING = {"docs/images/demo.png", "docs/journal.md", "docs/nano.md", "docs/results.md"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of these languages, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", RUN)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's blocks share one namespace, as a reader who types them in does."""
    monkeypatch.chdir(tmp_path)
    examples = blocks(ROOT / name, "python")
    assert examples
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for number, example in enumerate(examples, 1):
        exec(compile(example, f"{name}, example {number}", "exec"), namespace)


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `perdure ...` that a page shows as typed in, in blocks and in running text."""
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    lines += [line.removeprefix("$ ") for b in blocks(page, "text") for line in b.splitlines() if line[:2] == "$ "]
    lines += [" ".join(span.split()) for span in re.findall(r"`(perdure [^`]+)`", without_blocks(page))]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("perdure ")]


def parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and parameters, by the parser that the command line itself uses; it raises on mistakes."""
    root = typer.main.get_command(app)
    if arguments[0].startswith("-"):
        assert arguments[0] in {"--help", "-h", "--version"}
        return "", {}
    name, *rest = arguments
    with root.make_context("perdure", [name]) as above:
        _, command, _ = root.resolve_command(above, [name])
        assert command is not None
        # A page may speak of a command without all that it needs; the options it does name must exist.
        with command.make_context(name, rest, above, resilient_parsing=not rest) as context:
            return name, dict(context.params)


SHOWN = [(name_of(page), arguments) for page in PAGES for arguments in commands(page)]
# Mistakes that a page makes on purpose, to show the message.
MISSPELT = ("repaly",)


def test_pages_show_commands() -> None:
    assert len(SHOWN) > 30


@pytest.mark.parametrize(("page", "arguments"), SHOWN, ids=str)
def test_commands_exist(page: str, arguments: list[str]) -> None:
    if "--help" in arguments[1:]:
        arguments = arguments[:1]
    name, given = parse(arguments)
    if name == "run" and given.get("recipe"):
        recipe = given["recipe"]
        assert recipe in shipped() or recipe.endswith(".yaml")
        mode = given.get("strategy") or "naive"
        assert mode in STREAM_MODES or set(mode.split("+")) <= {*STRATEGIES, *MISSPELT}
        if recipe in shipped():
            settings_for(recipe, {}, given["override"] or [])
    if name == "demo":
        settings_for("arena-tasks", {}, given.get("override") or [])
    if name == "list" and given.get("what"):
        assert given["what"] in catalogue()


def test_messages_are_those_that_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's mistakes that need no earlier run, made in a folder that it calls /home/ada."""
    monkeypatch.chdir(tmp_path)
    (settings,) = (block for block in blocks(ROOT / "README.md", "yaml"))
    (tmp_path / "skills.yaml").write_text(settings)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": " b"}\n{"prompt": "c",\n')
    (tmp_path / "sums.csv").write_text("question,answer\n1+1,2\n")
    (tmp_path / "capitals.jsonl").write_text('{"prompt": "a", "answer": " b"}\n')
    (block,) = (block for block in blocks(ROOT / "docs" / "cli.md", "text") if block.startswith("$ "))
    shown = [part.split("\n", 1) for part in block.strip().split("\n\n")]
    tried = 0
    for line, message in shown:
        if "runs/first" in line or "runs/wild" in line:
            continue
        monkeypatch.setattr("sys.argv", shlex.split(line.removeprefix("$ ")))
        assert _guarded(app) == 2
        said = " ".join(capsys.readouterr().err.replace(str(tmp_path), "/home/ada").split())
        assert said.startswith(" ".join(message.split()).removesuffix("...")), line
        tried += 1
    assert tried == 5


def test_an_unknown_command_or_option_is_caught() -> None:
    with pytest.raises(Exception, match="No such command"):
        parse(["compare", "runs/a"])
    with pytest.raises(Exception, match="No such option"):
        parse(["run", "arena-tasks", "--epochs", "3"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_shown_as_yaml_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block)
        if set(values) == {"template"}:
            TaskSpec.model_validate({"name": "t", "train": "t.jsonl", **values})
        elif set(values) == {"probe"}:
            TaskSpec.model_validate(values["probe"])
        elif "train" in values:
            TaskSpec.model_validate({"name": "t", **values})
        else:
            RunSettings.model_validate(values)


def test_every_key_of_a_stream_and_every_setting_is_described() -> None:
    data = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for model in (StreamSpec, TaskSpec, TemplateSpec):
        for key in model.model_fields:
            assert re.search(rf"\b{key}:", data), key
    api = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for key, field in RunSettings.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {}) if key not in ("stream", "probe") else {}
        for name in [f"{key}.{part}" for part in inner] or [key]:
            assert f"`{name}`" in api, name


def shown(thing: Any) -> str:
    """A call with its defaults, as a page shows it."""
    parameters = inspect.signature(thing).parameters.values()
    arguments = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace("'", '"') for p in parameters
    ]
    return f"{thing.__name__}({', '.join(arguments)})"


def test_the_python_page_shows_every_call_as_it_is() -> None:
    page = " ".join((ROOT / "docs" / "python.md").read_text(encoding="utf-8").split())
    pure = (strategies.distillation, strategies.project_gem, strategies.project_agem)
    kept = (
        memory.ReservoirBuffer,
        memory.BalancedBuffer,
        memory.RingBuffer,
        memory.make_buffer,
        memory.load_buffer,
    )
    for thing in (*STRATEGIES.values(), strategies.Chain, *pure, *kept, ContinualTrainer):
        assert f"`{shown(thing)}`" in page, shown(thing)
    for name in (*strategies.__all__, *memory.__all__):
        assert name in page, name


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            assert file.relative_to(ROOT).as_posix() in MAY_BE_MISSING, target
        elif anchor:
            assert anchor in anchors(file), target


def test_every_strategy_has_a_page_and_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    index = (ROOT / "docs" / "strategies" / "index.md").read_text(encoding="utf-8")
    for name in STRATEGIES:
        assert (ROOT / "docs" / "strategies" / f"{name}.md").is_file()
        assert f"docs/strategies/{name}.md" in readme
        assert f"({name}.md)" in index


def test_tests_that_pages_name_exist() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    names = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    assert len(names) > 15
    assert not {name for name in names if f"def {name}(" not in sources}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategys_page_has_its_facts_and_settings(name: str) -> None:
    """What the class says of itself, word for word; and a row for each setting, with its default."""
    page = (ROOT / "docs" / "strategies" / f"{name}.md").read_text(encoding="utf-8")
    strategy = STRATEGIES[name]
    for label, fact in (("needs", strategy.needs), ("cost", strategy.cost), ("source", strategy.source)):
        assert fact
        assert f"\n| {label} | {fact} |\n" in page, label
    for title in ("Facts", "Rule", "Settings", "Cost", "Command", "What checks it", "Limits"):
        assert f"\n## {title}\n" in page, title
    for key, setting in settings_of(name).items():
        row = re.search(rf"^\| `{key}`( \(or .*\))? \| `?(?P<default>[^`|]+)`? \|", page, re.MULTILINE)
        assert row is not None, key
        assert row["default"] == ("none" if setting.default is None else str(setting.default)), key
        others = [alias for alias, meant in ALIASES.items() if meant == key]
        assert all(f"(or `{alias}`)" in row[0] for alias in others), key


def test_mutants_that_pages_name_are_planted() -> None:
    """What stands in backticks as planted is a class or a function of the tests that the page or the row names."""
    found = 0
    for page in (ROOT / "docs" / "strategies").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        sources = sources_named_in(text)
        for planted in re.findall(r"^Planted wrong versions.*?\n(?=\n)", text, re.MULTILINE | re.DOTALL):
            for name in re.findall(r"`(\w+)`", planted):
                assert defines(sources, name), f"{page.name}: {name}"
                found += 1
    for line in (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and "`tests/" in cells[4]:
            sources = sources_named_in(cells[4])
            assert cells[3].startswith("none") or re.search(r"`\w+`", cells[3]), cells[0]
            for name in re.findall(r"`(\w+)`", cells[3]):
                assert defines(sources, name), f"correctness.md, {cells[0]}: {name}"
                found += 1
    assert found > 60


def sources_named_in(text: str) -> str:
    """The source of every file of tests that a text names; a name without a file is a mistake."""
    return "".join((ROOT / file).read_text(encoding="utf-8") for file in re.findall(r"`(tests/[\w/]+\.py)`", text))


def defines(sources: str, name: str) -> bool:
    return re.search(rf"^(class|def) {name}[(:]", sources, re.MULTILINE) is not None


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme, page.name


def tree() -> tuple[set[str], set[str]]:
    """Files and folders that the README's tree names; depth is two spaces a level."""
    (block,) = [b for b in blocks(ROOT / "README.md", "text") if b.startswith("perdure/")]
    files, folders, above = set(), set(), []
    for line in block.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        above = above[: len(indent) // 2]
        path = "".join([*above, name])
        if name.endswith("/"):
            above.append(name)
            folders.add(path)
        else:
            files.add(path)
    return files, folders


def test_the_file_tree_is_the_tree() -> None:
    """A folder's line stands for its `__init__.py`; the folders of nano and of figures for their files."""
    files, folders = tree()
    there = {
        path.relative_to(ROOT).as_posix()
        for room in ("perdure", "benchmarks", "examples")
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not {"nano", "figures"} & set(path.parent.parts)
    }
    assert {path for path in files if "/" in path} == {path for path in there if not path.endswith("__init__.py")}
    assert all((ROOT / path).is_file() for path in files)
    rooms = {path.rpartition("/")[0] + "/" for path in there} | {"perdure/models/nano/", "benchmarks/figures/"}
    assert rooms == {folder for folder in folders if not folder.startswith(("tests", "docs"))}
    tests = {path.parent.relative_to(ROOT).as_posix() + "/" for path in (ROOT / "tests").rglob("test_*.py")}
    assert tests == {folder for folder in folders if folder.startswith("tests")}
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_the_citation_has_the_packages_version() -> None:
    from importlib.metadata import version

    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version("perdure")
