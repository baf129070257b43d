"""Which row each episode brings, against what the rules say of every prefix of a stream."""

from __future__ import annotations

from collections import Counter

import pytest

from perdure.errors import ConfigError
from perdure.order import priority
from perdure.training.episodes import Episodes
from perdure.types import Example

KINDS = ("math", "grid", "causal")


def pool(rows: int = 6, levels: tuple[int, ...] = (1, 2, 3)) -> list[Example]:
    """`rows` rows of every kind and level."""
    return [
        Example(f"{kind}-{level}-{i}", kind, fields={"level": level})
        for kind in KINDS
        for level in levels
        for i in range(rows)
    ]


def draw(episodes: Episodes, right: bool = True) -> list[Example]:
    found = []
    for _ in range(episodes.episodes):
        found.append(episodes.next())
        episodes.answered(found[-1], right)
    return found


def test_every_row_comes_once_before_any_comes_again() -> None:
    rows = pool(2)
    found = draw(Episodes(rows, 3 * len(rows), 0))
    for turn in range(3):
        part = found[turn * len(rows) : (turn + 1) * len(rows)]
        assert Counter(row.key for row in part) == Counter(row.key for row in rows)
    assert [row.key for row in found[: len(rows)]] != [row.key for row in found[len(rows) : 2 * len(rows)]]


def test_the_order_is_that_of_keyed_priorities() -> None:
    """Worked out from the definition: of the rows that came least often, the smallest priority comes first."""
    rows = pool(1)
    expected = sorted(rows, key=lambda row: priority(7, "episode", 0, key=row.key))
    assert [row.key for row in draw(Episodes(rows, len(rows), 7))] == [row.key for row in expected]


def test_blocks_bring_one_kind_after_another_in_equal_stretches() -> None:
    episodes = Episodes(pool(), 10, 0, drift="blocks", kinds=("grid", "math", "causal"))
    kinds = [row.task for row in draw(episodes)]
    assert kinds == ["grid"] * 4 + ["math"] * 3 + ["causal"] * 3
    assert [episodes.block_of(i) for i in range(10)] == [0] * 4 + [1] * 3 + [2] * 3
    assert {row.task for row in episodes.rows_of(1)} == {"math"}


def test_gradual_drift_fades_each_kind_into_the_next() -> None:
    """At a quarter of the way from the first kind's time to the last's, both neighbours weigh one half."""
    rows = pool(200)
    kinds = [row.task for row in draw(Episodes(rows, 1200, 3, drift="gradual", kinds=KINDS))]
    assert kinds[0] == "math"
    assert kinds[-1] == "causal"
    around = Counter(kinds[250:350])
    assert around.keys() == {"math", "grid"}
    assert 35 <= around["math"] <= 65
    assert Counter(kinds[580:620])["grid"] >= 35
    assert "math" not in kinds[601:]


def test_easy_first_takes_one_level_after_another() -> None:
    levels = [row.fields["level"] for row in draw(Episodes(pool(), 9, 0, curriculum="easy-first"))]
    assert levels == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    drifting = draw(Episodes(pool(), 18, 0, curriculum="easy-first", drift="blocks", kinds=KINDS))
    assert [row.fields["level"] for row in drifting] == [1, 1, 2, 2, 3, 3] * 3


def test_competence_opens_a_level_after_four_right_answers_of_the_last_five() -> None:
    rows = [row for row in pool(40) if row.task == "math"]
    episodes = Episodes(rows, 60, 0, curriculum="competence")
    answers = iter([True, False, True, True])  # three of four: not yet
    for right in answers:
        row = episodes.next()
        assert row.fields["level"] == 1
        episodes.answered(row, right)
    row = episodes.next()
    assert row.fields["level"] == 1
    episodes.answered(row, True)  # four of the last five
    opened = [episodes.next().fields["level"] for _ in range(20)]
    assert set(opened) == {1, 2}


def test_nothing_opens_for_wrong_answers() -> None:
    rows = [row for row in pool(40) if row.task == "math"]
    assert {row.fields["level"] for row in draw(Episodes(rows, 30, 0, curriculum="competence"), False)} == {1}


def test_groups_bring_one_kind_and_all_kinds_in_turn() -> None:
    kinds = [row.task for row in draw(Episodes(pool(), 30, 0, group=5))]
    groups = [set(kinds[i : i + 5]) for i in range(0, 30, 5)]
    assert all(len(group) == 1 for group in groups)
    for turn in (groups[:3], groups[3:]):
        assert set.union(*turn) == set(KINDS)


@pytest.mark.parametrize("curriculum", ["off", "easy-first", "competence"])
@pytest.mark.parametrize("drift", ["off", "blocks", "gradual"])
def test_a_stream_goes_on_where_it_was(drift: str, curriculum: str) -> None:
    def begin() -> Episodes:
        return Episodes(pool(3), 50, 1, drift=drift, curriculum=curriculum)  # type: ignore[arg-type]

    whole = [row.key for row in draw(begin())]
    first = begin()
    keys = []
    for _ in range(23):
        row = first.next()
        first.answered(row, True)
        keys.append(row.key)
    second = begin()
    second.load_state_dict(first.state_dict())
    for _ in range(27):
        row = second.next()
        second.answered(row, True)
        keys.append(row.key)
    assert keys == whole
    fresh = begin()
    assert [fresh.next().key for _ in range(27)] != keys[23:], "without the state it would differ"


def test_what_cannot_be_asked_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="drift"):
        Episodes(pool(), 3, 0, drift="sudden")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one row"):
        Episodes([], 3, 0)
    with pytest.raises(ConfigError, match="no row of kind 'code'"):
        Episodes(pool(), 3, 0, kinds=("code",))
    with pytest.raises(ConfigError, match="no whole number in its column 'level'"):
        Episodes([Example("a", "math")], 3, 0, curriculum="easy-first")
