from __future__ import annotations

import pytest

from perdure.errors import ConfigError, DataError
from perdure.streams import Stream, disjoint
from perdure.streams.stream import hold_out
from perdure.types import Example, Segment, Task


def one(key: str, text: str = "", task: str = "") -> Example:
    return Example(key, task, (Segment(text or key), Segment("!", learn=True)))


def task(name: str, train: str = "xy", evaluation: str = "z") -> Task:
    return Task(
        name, [one(f"{name}-{c}", task=name) for c in train], [one(f"{name}-{c}", task=name) for c in evaluation]
    )


def test_a_stream_is_a_sequence_of_named_tasks():
    stream = Stream([task("a"), task("b")])
    assert (len(stream), stream.names) == (2, ("a", "b"))
    assert [t.name for t in stream] == ["a", "b"]
    assert stream[1] is stream["b"] is stream.tasks[-1]
    assert stream.evaluations == stream.tasks
    with pytest.raises(ConfigError, match=r"unknown task 'c'.*Known: a, b"):
        stream["c"]
    with pytest.raises(IndexError):
        stream[2]


def test_joint_is_one_task_of_all_rows_scored_on_the_original_tasks():
    stream = Stream([task("a"), task("b", "q")])
    joint = stream.joint()
    assert joint.names == ("joint",)
    assert [(e.key, e.task) for e in joint["joint"].train] == [("a-x", "a"), ("a-y", "a"), ("b-q", "b")]
    assert joint.evaluations == stream.tasks
    assert joint.joint().evaluations == stream.tasks


def test_isolated_is_one_task_alone():
    stream = Stream([task("a"), task("b")])
    for which in (1, "b"):
        alone = stream.isolated(which)
        assert (alone.names, alone.evaluations) == (("b",), (stream["b"],))


def test_extend_adds_a_task_and_leaves_the_first_stream_alone():
    stream = Stream([task("a")])
    longer = stream.extend(task("b"))
    assert (stream.names, longer.names) == (("a",), ("a", "b"))
    assert [t.name for t in longer.evaluations] == ["a", "b"]
    with pytest.raises(ConfigError, match="'a'"):
        longer.extend(task("a"))


def test_what_is_no_stream_is_refused():
    with pytest.raises(ConfigError, match="at least one task"):
        Stream([])
    with pytest.raises(ConfigError, match="names must differ"):
        Stream([task("a"), task("a")])
    with pytest.raises(DataError, match="task 'b' has no training rows"):
        Stream([task("a"), task("b", "")])


def test_training_rows_that_are_evaluated_anywhere_are_dropped_and_counted():
    first = Task("a", [one("1", "The  Cat "), one("2", "dog")], [one("3", "bird")])
    second = Task("b", [one("4", "BIRD"), one("5", "fish")], [one("6", "the cat")])
    (a, b), counts = disjoint([first, second])
    assert [e.key for e in a.train] == ["2"]
    assert [e.key for e in b.train] == ["5"]
    assert counts == {"a": 1, "b": 1}
    assert len(b.evaluation) == 1


def test_rows_without_text_are_never_taken_for_equal():
    tensors = Task("a", [Example("1"), Example("2")], [Example("3")])
    assert disjoint([tensors])[1] == {"a": 0}


def test_a_share_is_held_out_row_by_row_so_that_a_new_row_moves_no_other():
    rows = [one(str(i)) for i in range(2000)]
    train, held = hold_out(rows, 0.25, 0, "t")
    # 2000 draws at 1/4: the standard deviation is 19, so 400 to 600 is more than 5 of them.
    assert 400 < len(held) < 600
    assert sorted(e.key for e in [*train, *held]) == sorted(e.key for e in rows)
    _, after = hold_out([*rows[::-1][:-1], one("new")], 0.25, 0, "t")
    assert {e.key for e in after} - {"new"} == {e.key for e in held} - {rows[0].key}
    assert {e.key for e in hold_out(rows, 0.25, 1, "t")[1]} != {e.key for e in held}


def test_a_number_of_rows_is_held_out_exactly():
    rows = [one(str(i)) for i in range(50)]
    train, held = hold_out(rows, 20, 0, "t")
    assert (len(train), len(held)) == (30, 20)
    assert [len(part) for part in hold_out(rows, 0, 0, "t")] == [50, 0]
