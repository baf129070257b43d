"""`perdure teach` as a person meets it: through a pseudo-terminal, through a pipe, killed and begun again."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perdure.recipes.teach.conversation import Conversation, read_lessons
from perdure.recipes.teach.lines import COMMANDS, Line, parse

NAMES = ("Anna", "Ben", "Cleo", "Dan", "Emma", "Finn", "Gina", "Hugo", "Iris", "Jack")
COLOURS = ("red", "blue", "green", "white", "black", "pink", "brown", "grey", "red", "blue")
THINGS = ("ball", "book", "cup", "hat", "key", "ring", "drum", "boat", "kite", "cow")
FACTS = [
    *((f"Who found the {c} {t}?", f"{n}.") for n, c, t in zip(NAMES, COLOURS, THINGS, strict=True)),
    *(
        (f"What colour is the {t} of {n}?", f"{c.capitalize()}.")
        for n, c, t in zip(NAMES[::-1], COLOURS, THINGS, strict=True)
    ),
]
QUICK = {"probe_rows": 16, "general": 2, "earlier": 4, "lr": 1e-3}
OPTIONS = [part for key, value in QUICK.items() if key != "lr" for part in ("--set", f"{key}={value}")]
OPTIONS += ["--lr", "1e-3"]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")


class Talk:
    """`perdure teach` at the other end of a pseudo-terminal."""

    def __init__(self, out: Path) -> None:
        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "200"}
        command = [sys.executable, "-m", "perdure.cli", "teach", "--out", str(out), *OPTIONS]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self._text = ""
        self.wait("/help lists the rest")

    def wait(self, text: str, seconds: float = 60) -> str:
        """What is said up to this text, which must come."""
        until = time.monotonic() + seconds
        while text not in self._text:
            ready, _, _ = select.select([self._master], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"{text!r} never came; there was: {self._text[-2000:]}"
            try:
                self._text += ESCAPES.sub("", os.read(self._master, 65536).decode(errors="replace"))
            except OSError as error:
                raise AssertionError(f"it ended before {text!r}: {self._text[-2000:]}") from error
        said, _, self._text = self._text.partition(text)
        return said + text

    def type(self, line: str, text: str = "") -> str:
        """Type a line, and wait for what it leads to."""
        os.write(self._master, (line + "\r").encode())
        return self.wait(text) if text else ""

    def kill(self) -> None:
        """As a power cut would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        os.close(self._master)

    def quit(self) -> None:
        """Leave."""
        self.type("/quit", "go on with: perdure teach --out")
        assert self.process.wait(20) == 0
        os.close(self._master)


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]


def test_twenty_lessons_undone_forgotten_killed_and_gone_on_with(tmp_path: Path) -> None:
    """20 lessons at a terminal: one undone, one forgotten, one killed in progress. The bytes are those of a
    teacher that was taught the 18 others, in another process.
    """
    from perdure.teaching import Teacher

    out = tmp_path / "lessons"
    talk = Talk(out)
    for number, (prompt, answer) in enumerate(FACTS[:12], start=1):
        talk.type(prompt)
        said = talk.type(f"no: {answer}", "KL ")
        assert f"lesson {number} is kept" in said, said
        assert f"after:  {answer}" in said, "the answer after the lesson is shown"
    talk.type("/undo", "lesson 12 is taken back")
    talk.type(FACTS[12][0])
    talk.type(f"no: {FACTS[12][1]}")
    time.sleep(0.05)
    talk.kill()

    before = len([e for e in events(out) if e["event"] == "lesson"])
    talk = Talk(out)
    for prompt, answer in FACTS[12 if before == 12 else 13 :]:
        talk.type(prompt)
        talk.type(f"no: {answer}", "is kept")
    talk.type("/forget 17", "lesson 17 is forgotten: ")
    listed = talk.type("/lessons", "probe ")
    talk.quit()

    journal = events(out)
    kept = [e["number"] for e in journal if e["event"] == "lesson" and e["kept"]]
    assert kept == list(range(1, 21)), "every lesson has its own number, and none was lost but the one in progress"
    assert [(e["event"], e["number"]) for e in journal if e["event"] in ("undo", "forget")] == [
        ("undo", 12),
        ("forget", 17),
    ]
    taught = [fact for i, fact in enumerate(FACTS) if i not in (11, 16)]
    assert [prompt for prompt, _ in taught if prompt not in listed] == [], listed
    assert FACTS[16][0] not in listed.partition("/lessons")[2]
    fresh = Teacher("nano", settings=QUICK, out=tmp_path / "fresh")
    for prompt, answer in taught:
        assert fresh.teach(prompt, answer).kept
    fresh.close()
    assert journal[-1]["address"] == fresh.address
    ours, theirs = (path / "states" / fresh.address / "state.safetensors" for path in (out, tmp_path / "fresh"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("Who is it?", Line("ask", "Who is it?")),
        ("no: Anna.", Line("correct", "Anna.")),
        ("NO : Anna.", Line("correct", "Anna.")),
        ("No idea?", Line("ask", "No idea?")),
        ("Nobody found it", Line("ask", "Nobody found it")),
        ("What colour is it? no", Line("ask", "What colour is it? no")),
        ("Quit smoking: how?", Line("ask", "Quit smoking: how?")),
        ("/ask no Green", Line("ask", "no Green")),
        ("/correct  Anna. ", Line("correct", "Anna.")),
        ("/forget 3", Line("forget", "3")),
        ("   ", None),
    ],
)
def test_what_a_line_asks_for(line: str, found: Line | None) -> None:
    assert parse(line) == found


@pytest.fixture(scope="module")
def talked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Conversation]:
    """A conversation in memory with a lesson of two wordings, and one that is only looked at."""
    import io

    from rich.console import Console

    from perdure.teaching import Teacher

    console = Console(file=io.StringIO(), width=200)
    path = tmp_path_factory.mktemp("talk")
    with Teacher("nano", settings=QUICK, out=path / "lessons") as teacher:
        yield Conversation(teacher, console, path / "lessons")


def said(talk: Conversation, *lines: str) -> str:
    """What is said to these lines."""
    talk.console.file.seek(0)  # type: ignore[union-attr]
    talk.console.file.truncate()
    for line in lines:
        assert talk.hear(line)
    return talk.console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_correction_with_other_wordings_and_what_it_cost(talked: Conversation) -> None:
    text = said(
        talked, "Who found the red ball?", "/also Tell me: who found the red ball?",
        "/check The red ball: found by?", "no: Anna.",
    )  # fmt: skip
    assert "after:  Anna." in text
    assert "lesson 1 is kept" in text
    assert "wordings 2 of 2 · held-out wordings" in text
    assert re.search(r"probe [\d.]+ % \(.* pt\) · KL 0\.\d+", text)
    assert "right" in said(talked, "/lessons")
    text = said(talked, "Who found the red ball?", "no: Ben.", "/lessons")
    assert "takes the place of lesson 1" in text
    assert "replaced" in text
    assert "lesson 2 is taken back" in said(talked, "/undo")


def test_a_refused_lesson_is_offered_in_other_forms(talked: Conversation) -> None:
    text = said(talked, "Who lives there?", "no: Xqzvwjk Qvxzzk Wqkjx.")  # words that nano never met
    assert "is not kept: it was not learnt in 30 steps" in text
    assert "/replay: teach it with more replay · /scale 0.5" in text
    assert "is not kept" in said(talked, "/scale")
    assert "left as it is" in said(talked, "/drop")
    assert "not learnt" in said(talked, "/why")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/foo", "unknown command 'foo'"),
        ("/exit", "Did you mean 'quit'?"),
        ("no Green", "did you mean `no: Green`? To ask it as it stands: /ask no Green"),
        ("No, Green.", "did you mean `no: Green.`?"),
        ("no", "did you mean `no: ANSWER`?"),
        ("quit", "did you mean `/quit`?"),
        ("Exit.", "did you mean `/quit`?"),
        ("why", "did you mean `/why`?"),
        ("forget 3", "did you mean `/forget 3`?"),
        ("no:", "/correct needs ANSWER"),
        ("/forget", "/forget needs N"),
        ("/forget x", "give the number of a lesson"),
        ("/forget 99", "the model has no lesson 99"),
        ("/scale 0.7", "'0.7' is no form"),
        ("/probe add nothing", "an arrow => stands between"),
        ("/probe all", "it is /probe, or"),
        ("/import nowhere.jsonl", "nowhere.jsonl: cannot be read"),
        ("word " * 600, "longer than the model's"),
    ],
)
def test_mistakes_are_said_and_nothing_is_lost(talked: Conversation, line: str, words: str) -> None:
    before = talked.teacher.address
    assert words in " ".join(said(talked, line).split())
    assert talked.teacher.address == before


def test_a_file_of_lessons_the_probe_and_the_adapter(talked: Conversation, tmp_path: Path) -> None:
    file = tmp_path / "lessons.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in FACTS[3:5]))
    assert "2 of 2 lessons are kept" in said(talked, f"/import {file}")
    assert "17 rows" in said(talked, "/probe add 2 + 2 = => 4.", "/probe")
    assert "the adapter is in" in said(talked, f"/export {tmp_path / 'adapter'}", "/save")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (talked.out / "adapter" / "adapter_config.json").is_file()
    text = said(talked, "/help")
    assert all(f"/{name}" in text for name in COMMANDS)
    text = said(talked, "What colour is the cow of Anna?", "/bad", "/good")
    assert "`no: ANSWER` teaches it" in text
    assert "is kept" in text
    assert not talked.hear("/quit")


def test_wordings_of_a_question_that_was_left_are_told(talked: Conversation) -> None:
    ask = "What colour is the kite of Iris?"
    text = said(talked, ask, "/also Iris has a kite of what colour?", "/check The kite of Iris?", "Who is Anna?")
    assert "left out, for no correction followed: 'Iris has a kite of what colour?', 'The kite of Iris?'" in text
    assert "left out" not in said(talked, "Who is Ben?")
    assert "left out" not in said(talked, ask, "/also The kite of Iris is", "no: White.", "Who is Ben?")


def test_an_answer_that_was_cut_is_marked_and_not_taught(talked: Conversation) -> None:
    """nano counts on for ever where it is only let say two tokens."""
    settings = talked.teacher.pupil.settings
    talked.teacher.pupil.settings = settings.model_copy(update={"max_new_tokens": 2})
    try:
        address = talked.teacher.address
        text = said(talked, "What colour is the drum of Gina and the boat of Hugo?", "/good")
    finally:
        talked.teacher.pupil.settings = settings
    assert re.search(r" …\ncut at 2 tokens; begin with --set max_new_tokens=4 to see more", text), text
    assert "error: the answer was cut, and would be taught as if it ended there" in text
    assert talked.teacher.address == address


def test_a_pipe_is_echoed_and_tells_what_was_refused(tmp_path: Path) -> None:
    """0 where all was done, 1 where a line was not; what follows it is done all the same."""
    command = [sys.executable, "-m", "perdure.cli", "teach", "--out", str(tmp_path / "lessons"), *OPTIONS]
    for lines, code in (
        (["Who found the red ball?", "no: Anna."], 0),
        (["/forget 9", "", "/undo", "quit"], 1),
    ):
        done = subprocess.run(command, input="\n".join(lines), text=True, capture_output=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        assert [f"> {line}" in done.stdout.splitlines() for line in lines if line] == [True] * len(
            list(filter(None, lines))
        )
    assert "error: the model has no lesson 9" in done.stdout
    assert "lesson 1 is taken back" in done.stdout
    assert "2 of the lines or lessons were refused" in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no lesson"),
        ("{", ":1: not JSON"),
        ("[1]", ":1: a lesson is"),
        ('{"prompt": "a"}', ":1: no 'answer'"),
        ('{"prompt": "a", "answer": 3}', ":1: answer must be a text"),
        (
            '{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": "b", "wording": "c"}',
            ":2: unknown key 'wording'",
        ),
        ('{"prompt": "a", "answer": "b", "wordings": ["a"]}', ":1: the wording 'a' stands twice"),
    ],
)
def test_a_file_with_a_mistake_teaches_nothing(tmp_path: Path, content: str, words: str) -> None:
    from perdure.errors import DataError

    file = tmp_path / "lessons.jsonl"
    file.write_text(content)
    with pytest.raises(DataError) as error:
        read_lessons(file)
    assert words in str(error.value)


def test_mistakes_before_anything_begins(perdure: Callable[..., Any], tmp_path: Path) -> None:
    for arguments, words in (
        (("--run", str(tmp_path / "none")), "no run here"),
        (("--run", str(tmp_path), "--model", "nano"), "leave --model out"),
        (("--tuning", "full"), "tuning"),
        (("--probe", str(tmp_path / "none.jsonl")), "none.jsonl"),
        (("--set", "max_stepps=3"), "max_stepps"),
    ):
        done = perdure("teach", *arguments, "--out", str(tmp_path / "out"))
        assert done.code == 2, done.out
        assert words in done.err
        assert not (tmp_path / "out").exists(), "nothing is left"


def test_the_model_of_a_run_is_taught_on(perdure: Callable[..., Any], tmp_path: Path) -> None:
    """A run of LoRA goes on with its own adapter; the export is one for the same base. Another tuning fails."""
    from perdure.teaching import Teacher

    run = tmp_path / "run"
    small = ("--episodes", "2", "--eval-tasks", "5", "--set", "pool=5", "--set", "probe=false", "--lr", "0.01")
    assert perdure("arena", *small, "--out", str(run)).code == 0
    from peft import PeftModel

    from perdure.models.load import load

    as_left = PeftModel.from_pretrained(load("nano").model, str(run / "checkpoint_ep00002"))
    with Teacher("nano", settings={**QUICK, "run": str(run)}) as teacher:
        start = teacher.pupil.weights()
        own = {name: value for name, value in as_left.named_parameters() if "lora_" in name}
        assert start.keys() == own.keys()
        assert all(start[name].equal(value) for name, value in own.items())
        assert any(value.abs().sum() > 0 for name, value in start.items() if "lora_B" in name)
        assert teacher.teach("Who found the red ball?", "Anna.").kept
        teacher.export(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"].endswith("nano")
    refused = perdure("teach", "--run", str(run), "--tuning", "soft-prompt", "--out", str(tmp_path / "out"))
    assert refused.code == 2
    assert "give --tuning lora" in refused.err
    refused = perdure("teach", "--run", str(run), "--set", "lora.r=4", "--out", str(tmp_path / "out"))
    assert refused.code == 2
    assert "leave lora.* out" in " ".join(refused.err.split())
    greeted = perdure("teach", "--run", str(run), "--out", str(tmp_path / "named"), *OPTIONS[:2])
    assert f"the model of {run} (lora" in greeted.out.replace("\n", "")
    file = tmp_path / "file"
    file.write_text("")
    refused = perdure("teach", "--out", str(file))
    assert refused.code == 2
    assert "is a file; lessons need a folder" in " ".join(refused.err.split())
    assert file.read_text() == ""
    refused = perdure("teach", "--out", str(run))
    assert refused.code == 2
    assert "holds a run that is no lessons" in refused.err
