from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import perdure
from perdure.errors import DataError
from perdure.order import fingerprint, priority
from perdure.streams import PREPARATIONS, Encoder, Row, StreamSpec, TaskSpec, build, build_task
from perdure.streams.latex import boxed
from perdure.streams.spec import locate, rows_of
from perdure.streams.stream import hold_out
from perdure.types import IGNORE, Task

pytest.importorskip("torch")
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def tokenizer():
    """One byte a token, and an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<end>"])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")


def write(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(count: int, start: int = 0, **more) -> list[dict]:
    return [
        {"id": f"r{i}", "prompt": f"question {i}?", "answer": f" {i}", **more} for i in range(start, start + count)
    ]


def spec(**task) -> StreamSpec:
    return StreamSpec.model_validate({"tasks": [{"name": "t", "train": "train.jsonl", **task}]})


def keys(examples) -> list[str]:
    return [example.key for example in examples]


def test_a_task_with_files_of_its_own_for_training_and_evaluation(tmp_path, tokenizer):
    write(tmp_path, "train.jsonl", rows(30))
    write(tmp_path, "test.jsonl", rows(5, 100))
    stream, facts = build(spec(evaluation="test.jsonl"), tmp_path, 0, Encoder(tokenizer, 64))
    assert (len(stream["t"].train), len(stream["t"].evaluation)) == (30, 5)
    assert keys(stream["t"].train) == [f"r{i}" for i in range(30)]
    assert all(example.task == "t" and example.x is not None for example in stream["t"].train)
    (task,) = facts["tasks"]
    assert sorted(task["sources"]) == [str(tmp_path / "test.jsonl"), str(tmp_path / "train.jsonl")]
    assert task["train"]["kept"] == 30
    assert json.loads(json.dumps(facts)) == facts


def test_without_evaluation_a_tenth_is_held_out(tmp_path, tokenizer):
    write(tmp_path, "train.jsonl", rows(400))
    task = build(spec(), tmp_path, 0, Encoder(tokenizer, 64))[0]["t"]
    # 400 draws at 1/10: mean 40, standard deviation 6.
    assert 15 < len(task.evaluation) < 65
    assert len(task.train) + len(task.evaluation) == 400
    assert not set(keys(task.train)) & set(keys(task.evaluation))
    exact = build(spec(holdout=7), tmp_path, 0, Encoder(tokenizer, 64))[0]["t"]
    assert len(exact.evaluation) == 7
    assert not build(spec(holdout=0), tmp_path, 0, Encoder(tokenizer, 64))[0]["t"].evaluation


def held_by_hand(data: list[dict], count: int, fits, erased=()) -> set[str]:
    """Keys of the rows with the smallest priorities of those that fit and are not erased, one by one."""
    order = sorted((row["id"] for row in data), key=lambda key: priority(0, "split", "t", key=key))
    lengths = {row["id"]: row for row in data}
    return set([key for key in order if key not in erased and fits(lengths[key])][:count])


def first_of_all(examples, holdout, seed, name, encode=None):
    """Held out whether or not they can be encoded."""
    return hold_out(examples, holdout, seed, name)


def none_in_their_place(examples, holdout, seed, name, encode):
    """Those that cannot be encoded are dropped, and nothing takes their place."""
    train, held = hold_out(examples, holdout, seed, name)
    return train, [example for example in held if encode([example])[0] is not None]


def encoded_by_file(examples, holdout, seed, name, encode):
    """The first of the file, not those with the smallest priorities."""
    held = [example for example in examples if encode([example])[0] is not None][:holdout]
    return [example for example in examples if example not in held], held


def held_out_of(folder: Path, tokenizer, erased: tuple[str, ...] = ()) -> tuple[Task, dict]:
    """Task and facts of a folder's rows, 15 of them held out; 64 tokens at most, 4 of them learnt."""
    settings = spec(holdout=15, answer_tokens=4, train_rows=40)
    gone = frozenset(map(fingerprint, erased))
    stream, facts = build(settings, folder, 0, Encoder(tokenizer, 64), erased=gone)
    return stream["t"], facts["tasks"][0]


@pytest.fixture
def uneven(tmp_path) -> list[dict]:
    """Of 200 rows, most cannot be encoded: two of three prompts are too long, and answers from ` 100` on."""
    data = rows(200)
    for i, row in enumerate(data):
        row["prompt"] += "x" * (100 if i % 3 else 0)
    write(tmp_path, "train.jsonl", data)
    return data


def usable(row: dict) -> bool:
    return len(row["prompt"] + row["answer"]) + 1 <= 64 and len(row["answer"]) + 1 <= 4


def test_a_number_of_held_out_rows_means_rows_that_can_be_encoded(tmp_path, tokenizer, uneven):
    """34 of the 200 rows can be encoded. Where held-out rows are erased, others come for them."""
    assert sum(map(usable, uneven)) == 34
    erased: tuple[str, ...] = ()
    for _ in range(2):
        expected = held_by_hand(uneven, 15, usable, erased)
        task, facts = held_out_of(tmp_path, tokenizer, erased)
        assert set(keys(task.evaluation)) == expected
        assert facts["evaluation"]["kept"] == facts["evaluation"]["rows"] == facts["train"]["held_out"] == 15
        assert facts["evaluation"]["left_out"] == {}
        left = {row["id"] for row in uneven if usable(row)} - expected - set(erased)
        assert set(keys(task.train)) == left
        # All others were offered to training, and each is counted once.
        assert sum(facts["train"]["left_out"].values()) == 200 - 34
        assert facts["train"]["left_out"]["answer too long"] == sum(
            len(row["answer"]) > 3 and len(row["prompt"]) < 50 for row in uneven
        )
        all_rows = rows_of(spec(holdout=15, answer_tokens=4), tmp_path, 0, Encoder(tokenizer, 64))
        assert sorted(keys(all_rows)) == sorted(row["id"] for row in uneven)
        erased = tuple(sorted(expected)[:5])


def test_where_all_that_can_be_encoded_is_held_out_it_is_said(tmp_path, tokenizer, uneven):
    """34 rows fit, so that 50 cannot be held out, and of 34 none is left to train on."""
    for holdout in (50, 34):
        with pytest.raises(DataError, match=r"of 200 rows read, \d+ too long, \d+ answer too long, 34 held out\."):
            build(spec(holdout=holdout, answer_tokens=4), tmp_path, 0, Encoder(tokenizer, 64))


@pytest.mark.parametrize("mutant", [first_of_all, none_in_their_place, encoded_by_file])
def test_other_ways_to_hold_out_are_caught(tmp_path, tokenizer, uneven, mutant, monkeypatch):
    monkeypatch.setattr("perdure.streams.spec.hold_out", mutant)
    task, _ = held_out_of(tmp_path, tokenizer)
    assert set(keys(task.evaluation)) != held_by_hand(uneven, 15, usable)


def test_a_number_of_held_out_rows_costs_few_calls_of_the_tokenizer(tmp_path, tokenizer, uneven, monkeypatch):
    """Each call asks for as many as are missing: 15, then what is left of these; one by one it would be over 60."""
    asked: list[int] = []
    encode_many = Encoder.encode_many

    def counted(self, examples):
        asked.append(len(examples))
        return encode_many(self, examples)

    monkeypatch.setattr(Encoder, "encode_many", counted)
    rows_of(spec(holdout=15, answer_tokens=4), tmp_path, 0, Encoder(tokenizer, 64))
    assert asked[0] == 15
    assert len(asked) < 30
    assert asked == sorted(asked, reverse=True)


def test_a_share_of_held_out_rows_is_as_it_was(tmp_path, tokenizer, uneven):
    """Each row by its own priority, whether or not it can be encoded."""
    stream, facts = build(spec(holdout=0.5, answer_tokens=4), tmp_path, 0, Encoder(tokenizer, 64))
    held = {row["id"] for row in uneven if priority(0, "split", "t", key=row["id"]) < 0.5 * 2**64}
    assert set(keys(stream["t"].evaluation)) == {row["id"] for row in uneven if usable(row)} & held
    assert facts["tasks"][0]["evaluation"]["rows"] == len(held)


def test_caps_follow_from_keys_not_from_the_order_of_the_file(tmp_path, tokenizer):
    write(tmp_path, "train.jsonl", rows(100))
    one = build(spec(train_rows=20, evaluation_rows=5, holdout=30), tmp_path, 0, Encoder(tokenizer, 64))[0]["t"]
    write(tmp_path, "train.jsonl", rows(100)[::-1])
    two = build(spec(train_rows=20, evaluation_rows=5, holdout=30), tmp_path, 0, Encoder(tokenizer, 64))[0]["t"]
    assert set(keys(one.train)) == set(keys(two.train))
    assert set(keys(one.evaluation)) == set(keys(two.evaluation))
    assert (len(one.train), len(one.evaluation)) == (20, 5)
    other = build(spec(train_rows=20, evaluation_rows=5, holdout=30), tmp_path, 1, Encoder(tokenizer, 64))[0]["t"]
    assert set(keys(one.train)) != set(keys(other.train))


def test_a_row_that_does_not_fit_is_replaced_by_the_next(tmp_path, tokenizer):
    data = rows(60)
    for row in data[::2]:
        row["prompt"] += "x" * 100
    write(tmp_path, "train.jsonl", data)
    stream, facts = build(spec(train_rows=20, holdout=0), tmp_path, 0, Encoder(tokenizer, 64))
    assert len(stream["t"].train) == 20
    assert facts["tasks"][0]["train"]["left_out"]["too long"] > 0
    assert facts["tasks"][0]["notes"] == []
    stream, facts = build(spec(train_rows=40, holdout=0), tmp_path, 0, Encoder(tokenizer, 64))
    assert len(stream["t"].train) == 30
    assert "30 train rows, 40 were asked for" in facts["tasks"][0]["notes"][0]


def test_answers_over_the_limit_are_left_out(tmp_path, tokenizer):
    """` 9` and the end are 3 tokens, ` 10` and the end 4."""
    write(tmp_path, "train.jsonl", rows(20))
    stream, _ = build(spec(answer_tokens=3, holdout=0), tmp_path, 0, Encoder(tokenizer, 64))
    assert keys(stream["t"].train) == [f"r{i}" for i in range(10)]


def test_evaluated_texts_are_not_trained_on_in_any_task(tmp_path, tokenizer):
    write(tmp_path, "a.jsonl", rows(10))
    write(tmp_path, "b.jsonl", rows(10, 10))
    write(
        tmp_path,
        "held.jsonl",
        [{"prompt": "Question  3?", "answer": " 3"}, {"prompt": "question 12?", "answer": " 12"}],
    )
    tasks = [
        {"name": "a", "train": "a.jsonl", "holdout": 0},
        {"name": "b", "train": "b.jsonl", "evaluation": "held.jsonl"},
    ]
    stream, facts = build(StreamSpec.model_validate({"tasks": tasks}), tmp_path, 0, Encoder(tokenizer, 64))
    assert "r3" not in keys(stream["a"].train)
    assert "r12" not in keys(stream["b"].train)
    assert [task["train"]["overlapping"] for task in facts["tasks"]] == [1, 1]


def test_a_later_task_respects_what_was_trained_and_scored_before(tmp_path, tokenizer):
    encoder = Encoder(tokenizer, 64)
    write(tmp_path, "train.jsonl", rows(10))
    write(tmp_path, "test.jsonl", rows(2, 10))
    before, _ = build(spec(evaluation="test.jsonl"), tmp_path, 0, encoder)
    write(tmp_path, "new.jsonl", rows(10, 8))
    write(tmp_path, "new_test.jsonl", [*rows(1, 5), *rows(1, 50)])
    later = TaskSpec(name="later", train="new.jsonl", evaluation="new_test.jsonl")
    task, facts = build_task(later, tmp_path, 0, encoder, earlier=before.tasks)
    assert keys(task.train) == ["r8", "r9", *(f"r{i}" for i in range(12, 18))]
    assert keys(task.evaluation) == ["r50"]
    assert facts["tasks"][0]["evaluation"]["overlapping"] == 1


def test_a_task_of_which_nothing_is_left_says_why(tmp_path, tokenizer):
    write(tmp_path, "train.jsonl", rows(4))
    with pytest.raises(DataError, match="task 't' has no training rows left: of 4 rows read, 4 too long"):
        build(spec(holdout=0), tmp_path, 0, Encoder(tokenizer, 8))


def test_messages_without_a_template(tmp_path, tokenizer):
    talk = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    write(tmp_path, "train.jsonl", [{"id": "x", "messages": talk}])
    encoder = Encoder(tokenizer, 64)
    (example,) = build(spec(holdout=0), tmp_path, 0, encoder)[0]["t"].train
    assert tokenizer.decode(example.x) == "User:\n2+2?\n\nAssistant:\n4<end>"
    assert tokenizer.decode(example.y[example.y != IGNORE]) == "4<end>"
    assert encoder.reference(example) == "4"


def test_where_keeps_equal_values(tmp_path, tokenizer):
    write(tmp_path, "train.jsonl", [*rows(3, split="train", level=1), *rows(3, 3, split="dev", level=2)])
    encoder = Encoder(tokenizer, 64)
    assert (
        len(build(spec(where={"split": "dev", "level": "2"}, holdout=0), tmp_path, 0, encoder)[0]["t"].train) == 3
    )
    with pytest.raises(DataError, match=r"no row has split = 'test' .*'dev', 'train'"):
        build(spec(where={"split": "test"}), tmp_path, 0, encoder)
    with pytest.raises(DataError, match=r"train\.jsonl:1: no column 'part'"):
        build(spec(where={"part": "x"}), tmp_path, 0, encoder)


def test_paths_are_looked_up_in_the_data_folder_then_beside_the_recipe_then_here(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("data", "recipe", "here")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.chdir(folders[2])
    for folder in reversed(folders):
        write(folder, "d.jsonl", rows(1))
        assert Path(locate("d.jsonl", folders[:2])).resolve() == folder / "d.jsonl"
    assert locate("owner/name", folders[:2]) == "owner/name"
    for outside in ("../d.jsonl", "sub/../../d.jsonl", ".."):
        with pytest.raises(DataError, match="leads out of the folder it is looked up in"):
            locate(outside, folders[:2])
    with pytest.raises(DataError, match=r"no such file or folder; looked for .*recipe.*--data"):
        locate("sub/missing.jsonl", folders[:2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of tasks"),
        ({"tasks": [], "arena": None}, "tasks"),
        ({"arena": {}, "tasks": [{"name": "t", "train": "x"}]}, "give one of tasks"),
        ({"tasks": [{"name": "t", "train": "x"}] * 2}, "names must differ"),
        ({"tasks": [{"name": "t", "train": "x", "trainrows": 3}]}, "trainrows"),
        ({"tasks": [{"name": "t", "train": "x", "prepare": "hotpo"}]}, "Did you mean 'hotpot'"),
        ({"tasks": [{"name": "t", "train": "x", "answers": "maths"}]}, "unknown rule for answers .*'math'"),
        ({"tasks": [{"name": "t", "train": "x", "template": {"answer": "{a.b}"}}]}, "plain columns"),
        ({"tasks": [{"name": "t", "train": "x", "template": [{"text": "{a}"}]}]}, "must be learnt"),
        ({"tasks": [{"name": "t", "train": "x", "holdout": 1.5}]}, "below 1"),
        ({"tasks": [{"name": "t", "train": "x", "evaluation": "y", "holdout": 3}]}, "exclude"),
        ({"tasks": [{"name": "t", "train": "x", "train_rows": 0}]}, "train_rows"),
        ({"arena": {"kinds": ["comparison", "logic"]}}, "unknown arena kind 'logic'"),
        ({"arena": {"kinds": ["math", "math"]}}, "must differ"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        StreamSpec.model_validate(settings)


def test_the_arena_as_a_stream(tokenizer):
    settings = {"arena": {"kinds": ["sequence", "comparison"], "train_rows": 12, "evaluation_rows": 4}}
    stream, facts = build(StreamSpec.model_validate(settings), None, 0, Encoder(tokenizer, 512))
    assert stream.names == ("sequence", "comparison")
    for task in stream:
        assert (len(task.train), len(task.evaluation)) == (12, 4)
        assert set(task.train[0].fields) == {"kind", "level"}
        assert not set(keys(task.train)) & set(keys(task.evaluation))
    assert facts["tasks"][0]["train"]["kept"] == 12
    again, _ = build(StreamSpec.model_validate(settings), None, 0, Encoder(tokenizer, 512))
    assert keys(again["sequence"].train) == keys(stream["sequence"].train)


def test_hotpot_brings_both_published_forms_to_the_same_columns():
    lists = {
        "context": [["A", ["a0.", " a1."]], ["B", ["b0."]], ["C", ["c0.", " c1."]]],
        "supporting_facts": [["C", 1], ["A", 0], ["A", 1], ["C", 9]],
    }
    dicts = {
        "context": {"title": ["A", "B", "C"], "sentences": [["a0.", " a1."], ["b0."], ["c0.", " c1."]]},
        "supporting_facts": {"title": ["C", "A", "A", "C"], "sent_id": [1, 0, 1, 9]},
    }
    for values in (lists, dicts):
        prepared = PREPARATIONS["hotpot"](Row(values, "f", 1)).values
        assert prepared["support"] == "A: a0. a1.\nC: c1."
        assert prepared["paragraphs"] == "A: a0. a1.\nB: b0.\nC: c0. c1."
    assert PREPARATIONS["hotpot"](Row({**lists, "supporting_facts": [["Z", 0]]}, "f", 1)) is None
    with pytest.raises(DataError, match="f:3: not a HotpotQA row"):
        PREPARATIONS["hotpot"](Row({"question": "?"}, "f", 3))


def test_math_brings_both_published_forms_together():
    hub = {
        "problem": "p",
        "level": "Level 3",
        "type": "Algebra",
        "solution": r"so \boxed{1} or \boxed{\frac{1}{2}}.",
    }
    prepared = PREPARATIONS["math"](Row(hub, "f", 1)).values
    assert (prepared["level"], prepared["answer"]) == (3, r"\frac{1}{2}")
    assert PREPARATIONS["math"](Row({**hub, "level": 3, "answer": "x"}, "f", 1)).values["answer"] == "x"
    assert PREPARATIONS["math"](Row({**hub, "level": "Level ?"}, "f", 1)).values["level"] is None
    assert boxed(r"\boxed{open") is None
    with pytest.raises(DataError, match="not a MATH row"):
        PREPARATIONS["math"](Row({"problem": "p"}, "f", 1))


def test_the_shipped_recipe_on_the_real_data(shared, bitstories):
    from transformers import AutoTokenizer

    recipe = yaml.safe_load((Path(perdure.__file__).parent / "recipes" / "math-hotpot.yaml").read_text())
    settings = StreamSpec.model_validate(recipe["stream"])
    encoder = Encoder(AutoTokenizer.from_pretrained(bitstories), 512)
    stream, facts = build(settings, shared / "data", 0, encoder)
    assert stream.names == ("math", "hotpot")
    assert [task.answers for task in settings.tasks] == ["math", "hotpot"]
    assert facts["tasks"][1]["evaluation"]["rows"] == 400
    for example in stream["hotpot"].train[:50]:
        assert not {"paragraphs", "support"} & example.fields.keys()
    for task, fact in zip(stream, facts["tasks"], strict=True):
        assert (len(task.train), len(task.evaluation), fact["notes"]) == (800, 200, [])
        assert max(len(example.x) for example in task.train) <= 512
        assert max(int((example.y != IGNORE).sum()) for example in task.train) <= 256
    digest = facts["tasks"][0]["sources"][str(shared / "data" / "math_train.jsonl.gz")]
    assert digest == "e92003ecbfdca91bb2f49dd6aa95456888c90ad5b93d03349fb316bf76dfde9e"
    example = stream["math"].train[0]
    assert example.fields["answer"] in encoder.reference(example)


def test_the_room_is_light_to_import():
    code = (
        "import sys, perdure.streams; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
