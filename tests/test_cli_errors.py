"""Mistakes on the command line: exit code, what is said, and that nothing is left behind or changed."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


@pytest.fixture
def refused(perdure: Command, recipe: Path, tmp_path: Path) -> Callable[..., str]:
    """What `perdure run` says against the recipe with some arguments; nothing may be left behind."""

    def run(*arguments: str | Path, of: str | Path = recipe) -> str:
        out = tmp_path / "refused"
        done = perdure("run", of, *arguments, "--out", out)
        assert done.code == 2, done
        assert done.err.startswith("error: ")
        assert "Traceback" not in done.err + done.out
        assert not out.exists()
        return str(done.err.removeprefix("error: ").rstrip("\n"))

    return run


@pytest.fixture
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*arguments: Any, **settings: Any) -> Any:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)


# Models


@pytest.mark.usefixtures("without_network")
def test_a_hub_model_without_a_network(refused: Callable[..., str]) -> None:
    said = refused("--model", "nosuch/model-at-all")
    assert said.startswith("model 'nosuch/model-at-all' is not a folder here and could not be fetched from the hub")
    assert "give the folder's path with --model" in said


def test_a_model_folder_without_weights(refused: Callable[..., str], recipe: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(recipe.parent / "model", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    said = refused("--model", bare)
    assert f"model folder '{bare}' holds no weights (model.safetensors" in said
    assert "save_pretrained" in said


@pytest.mark.parametrize("name", ["./nosuch", "/no/such/folder", "nosuch"])
def test_a_model_folder_that_does_not_exist(refused: Callable[..., str], name: str) -> None:
    said = refused("--model", name)
    assert said.startswith(f"model '{name}' is not a folder here")
    assert "(nano)" in said


# Data


def recipe_of(folder: Path, train: str, more: str = "", model: Path | None = None) -> Path:
    path = folder / "own.yaml"
    name = json.dumps(str(model)) if model else "nano"
    path.write_text(f"model: {name}\nstream: {{tasks: [{{name: t, train: {train}{more}}}]}}\n")
    return path


GOOD = '{"prompt": "w1", "answer": "w2"}\n'


@pytest.mark.usefixtures("without_network")
def test_a_hub_data_set_without_a_network(refused: Callable[..., str], recipe: Path, tmp_path: Path) -> None:
    said = refused(of=recipe_of(tmp_path, "nosuch/rows", model=recipe.parent / "model"))
    assert said.startswith("nosuch/rows: not a local path, not downloaded before, and the hub cannot be reached.")
    assert "--data" in said


@pytest.mark.parametrize(
    ("name", "text", "more", "message"),
    [
        ("d.jsonl", None, "", r"d.jsonl: no such file or folder; looked for {folder}/d.jsonl"),
        ("d.jsonl", GOOD + '{"prompt": \n' + GOOD + "[1]\n", "", "{folder}/d.jsonl:2: not JSON: "),
        ("d.jsonl", GOOD + '{"prompt": \n' + GOOD + "[1]\n", "", "{folder}/d.jsonl:4: a list, but every line must"),
        (
            "d.csv", "prompt,answer\nw1,w2\nw3\n", "",
            "{folder}/d.csv:3: 1 field, but the header has 2; it needs prompt, answer",
        ),
        (
            "d.csv", "prompt,answer\nw1,w2,w3\n", "",
            "{folder}/d.csv:2: 3 fields, but the header has 2; quote a comma in a text",
        ),
        (
            "d.jsonl", GOOD, ', template: {prompt: "{question} ", answer: "{answer}"}',
            "{folder}/d.jsonl:1: no column 'question'. The row has: 'prompt', 'answer'.",
        ),
        ("d.jsonl", '{"foo": "a"}\n', "", "{folder}/d.jsonl:1: cannot tell what to learn."),
    ],
)  # fmt: skip
def test_data_that_cannot_be_read(
    refused: Callable[..., str], recipe: Path, tmp_path: Path, name: str, text: str | None, more: str, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    said = refused(of=recipe_of(tmp_path, name, more, recipe.parent / "model"))
    assert message.format(folder=tmp_path) in said


def test_a_data_folder_that_does_not_exist(refused: Callable[..., str]) -> None:
    assert refused("--data", "/no/such/folder") == "--data /no/such/folder: no such folder"


# Settings


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            ("--strategy", "repaly"),
            ["unknown strategy 'repaly'. Did you mean 'replay'?", "isolated", "joint", "ewc"],
        ),
        (("--strategy", "replay+joint"), ["joint stands alone"]),
        (("--set", "epoch=3"), ["unknown setting 'epoch'. Did you mean 'epochs'?"]),
        (("--set", "optimizer.learning_rate=1"), ["unknown setting 'optimizer.learning_rate'", "optimizer.lr"]),
        (("--set", "continual_strategy.ewc.strenght=1"), ["unknown setting of ewc 'strenght'", "'strength'"]),
        (("--set", "epochs=three"), ["epochs: must be a valid integer, got 'three'"]),
        (("--set", "epochs"), ["--set 'epochs': must be key=value"]),
        (("--set", "epochs=[1"), ["--set 'epochs=[1': the value is not valid YAML"]),
        (
            ("--set", "epochs=0", "--set", "batch_size=-1"),
            ["2 mistakes", "epochs: must be greater than or equal to 1, got 0", "batch_size: must be greater"],
        ),
    ],
)
def test_settings(refused: Callable[..., str], arguments: tuple[str, ...], messages: list[str]) -> None:
    said = refused(*arguments)
    for message in messages:
        assert message in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stream:\n  tasks: [a\nepochs: 3\n", "bad.yaml, line 3: not valid YAML: "),
        ("- a\n", "bad.yaml: must hold a mapping of settings, got list"),
        ("epochs: 2\n", "bad.yaml: stream: missing"),
        (None, "bad.yaml: no such file"),
    ],
)
def test_bad_yaml(refused: Callable[..., str], tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    assert message in refused(of=path)


def test_an_unknown_recipe(refused: Callable[..., str]) -> None:
    assert "unknown recipe 'arena-task'. Did you mean 'arena-tasks'?" in refused(of="arena-task")


# Folders


def test_a_folder_that_holds_something_else(
    perdure: Command, recipe: Path, finished_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out, message in (
        (finished_run, f"{finished_run} holds a run already: add --resume to go on with it, or give another --out"),
        (tmp_path, "is not empty and holds no run; give another folder with --out"),
        (tmp_path / "notes.txt", "is a file; give a folder with --out"),
    ):
        done = perdure("run", recipe, "--out", out)
        assert done.code == 2
        assert message in done.err
    before = (finished_run / "results.json").read_bytes()
    other = perdure("run", recipe, "--strategy", "naive", "--out", finished_run, "--resume")
    assert other.code == 2
    assert 'strategy: "replay" there, "naive" now' in other.err
    assert (finished_run / "results.json").read_bytes() == before


def test_no_run_there(perdure: Command, tmp_path: Path) -> None:
    for command in (("evaluate",), ("generate",), ("report",), ("extend",)):
        done = perdure(*command, tmp_path / "none", *(["hello"] if command == ("generate",) else []))
        assert done.code == 2
        assert str(tmp_path / "none") in done.err
        assert "Traceback" not in done.err


def test_a_run_that_a_later_perdure_wrote(
    perdure: Command, recipe: Path, finished_run: Path, tmp_path: Path
) -> None:
    for name, old, new, commands in (
        ("config.yaml", "format: 1", "format: 2", ("evaluate", "run", "extend")),
        ("results.json", '"format": 1', '"format": 2', ("report",)),
        ("checkpoints/final/state.json", '"format": 1', '"format": 2', ("evaluate",)),
    ):
        run = tmp_path / name.replace("/", "-")
        shutil.copytree(finished_run, run)
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))
        for command in commands:
            done = perdure("run", recipe, "--out", run, "--resume") if command == "run" else perdure(command, run)
            assert done.code == 2, (name, command)
            assert "format 2" in done.err
            assert "perdure" in done.err
        assert (run / name).read_text() == text.replace(old, new, 1)
