"""Hidden states that are kept: equal to those worked out anew, found again on disk, never another backbone's."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from perdure.errors import ModelError
from perdure.models import hidden
from perdure.models.heads import MHAR
from perdure.models.hidden import HiddenStates, cache_folder
from perdure.models.objectives import PAD
from perdure.models.regressor import Regressor

BASE = {"model.safetensors": "a1", "config.json": "b2"}
FP16 = {"rtol": 2**-10, "atol": 2**-14}  # eleven bits


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def backbone() -> Any:
    """A random BERT, which attends both ways, in train mode with dropout."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.3, hidden_dropout_prob=0.3,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).train()


@pytest.fixture(scope="module")
def rows() -> list[Tensor]:
    """70 rows of 1 to 20 tokens, which are more than two forward passes take."""
    rng = torch.Generator().manual_seed(0)
    lengths = [1, 20, *torch.randint(2, 20, (68,), generator=rng).tolist()]
    return [torch.randint(0, 40, (n,), generator=rng) for n in lengths]


def batch(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=PAD)


class Counted:
    """A regressor's own forward pass, and how many calls and rows it had."""

    def __init__(self, model: Regressor) -> None:
        self.model, self.calls, self.rows = model, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.model._frozen(x)


@pytest.fixture
def counted(backbone: Any) -> Counted:
    return Counted(Regressor(backbone, nn.Identity(), HiddenStates(BASE)))


def live(backbone: Any, row: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = backbone.eval()(input_ids=row[None]).last_hidden_state[0]
        return found


def check_states(cache: HiddenStates, counted: Counted, backbone: Any, rows: list[Tensor]) -> None:
    """Each row's states in a batch are those of the row alone, to what fp16 can say; behind them zeros."""
    found = cache(batch(rows), counted)
    assert found.dtype == torch.float32
    for row, states in zip(rows, found, strict=True):
        torch.testing.assert_close(states[: len(row)], live(backbone, row), **FP16)
        assert not states[len(row) :].any()
    assert cache(batch(rows)[:1], counted).shape[1] == found.shape[1]  # with the padding of the batch it was in


def test_what_is_kept_equals_what_is_worked_out(counted: Counted, backbone: Any, rows: list[Tensor]) -> None:
    """70 rows are 70 passes; what was filled is not worked out when it is asked for."""
    cache = HiddenStates(BASE)
    assert cache.fill(rows, counted) == len(cache) == 70
    assert (counted.calls, counted.rows) == (70, 70)
    check_states(cache, counted, backbone, rows)
    assert cache.fill(rows[::-1], counted) == 0
    assert counted.calls == 70


def test_bits_do_not_depend_on_what_else_was_missing(counted: Counted, rows: list[Tensor], tmp_path: Path) -> None:
    """Filled at once, or in two goes of which the second finds half: equal to the last bit."""
    once, twice = HiddenStates(BASE, tmp_path / "once"), HiddenStates(BASE, tmp_path / "twice")
    once.fill(rows, counted)
    twice.fill(rows[1::3], counted)
    twice.fill(rows, counted)
    assert all(torch.equal(once(row[None], counted), twice(row[None], counted)) for row in rows)


def test_single_rows_equal_batched_ones(counted: Counted, rows: list[Tensor], tmp_path: Path) -> None:
    one, many = HiddenStates(BASE, tmp_path / "nowhere"), HiddenStates(BASE)
    many.fill(rows, counted)
    singly = [one(row[None], counted)[0] for row in rows[:9]]
    for row, states, batched in zip(rows[:9], singly, many(batch(rows[:9]), counted), strict=True):
        torch.testing.assert_close(batched[: len(row)], states, **FP16)
    assert not (tmp_path / "nowhere").exists()  # rows that nobody announced stay in memory


def test_another_process_reads_and_works_nothing_out(counted: Counted, backbone: Any, rows: list[Tensor]) -> None:
    """A new object has the same bits from the file; one more row alone is worked out."""
    first = HiddenStates(BASE)
    first.fill(rows, counted)
    files = list(first.folder.iterdir())
    assert [file.suffix for file in files] == [".safetensors"]
    counted.calls = counted.rows = 0
    second = HiddenStates(dict(reversed(BASE.items())))
    assert second.fill(rows[5:30], counted) == 0
    assert counted.calls == 0
    assert torch.equal(second(batch(rows), counted), first(batch(rows), counted))
    assert counted.calls == 0
    third = HiddenStates(BASE)
    assert third.fill([*rows, torch.tensor([1, 2, 3])], counted) == 1
    assert (counted.calls, counted.rows) == (1, 1)
    assert len(list(first.folder.iterdir())) == 2
    assert HiddenStates(BASE).fill([torch.tensor([1, 2, 3]), rows[0]], counted) == 0


def test_what_was_worked_out_before_a_stop_is_kept(
    counted: Counted, rows: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill loses what came after the last part; Ctrl-C and errors lose nothing."""
    monkeypatch.setattr(hidden, "PART_SECONDS", 0.0)  # a file a row
    monkeypatch.setattr(hidden, "MOST_WORKERS", 1)  # so that it can be said which rows were done

    class Killed(BaseException):
        pass

    def forward(x: Tensor) -> Tensor:
        if counted.rows == 30:
            raise Killed
        return counted(x)

    with pytest.raises(Killed):
        HiddenStates(BASE).fill(rows, forward)
    assert len(list(cache_folder().rglob("*.safetensors"))) == 30
    monkeypatch.setattr(hidden, "PART_SECONDS", 60.0)
    again, new = HiddenStates(BASE), [torch.tensor([1, 2, 3, 4, 5]), torch.tensor([2, 3, 4, 5, 6])]
    assert again.fill(rows, counted) == 40
    with pytest.raises(KeyboardInterrupt):
        again.fill([*rows, *new], _stopping(counted))
    assert HiddenStates(BASE).fill([*rows, *new], counted) == 1


def _stopping(counted: Counted) -> Any:
    """Ctrl-C in the second pass."""
    calls: list[int] = []

    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return counted(x)

    return forward


def test_rows_go_side_by_side_each_on_one_thread_to_the_same_bits(
    counted: Counted, rows: list[Tensor], tmp_path: Path
) -> None:
    both = threading.Barrier(2, timeout=60)
    first: list[int] = []
    found = {}

    def forward(x: Tensor) -> Tensor:
        assert torch.get_num_threads() == 1
        first.append(threading.get_ident())
        if len(first) <= 2 == threads:
            both.wait()  # for the other row that is under way
        return counted(x)

    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            states = HiddenStates(BASE, tmp_path / str(threads))
            assert states.fill(rows, forward) == len({hidden.name_of(row) for row in rows})
            assert torch.get_num_threads() == threads
            found[threads] = states(batch(rows), forward)
    finally:
        torch.set_num_threads(before)
    assert first[0] != first[1]
    assert torch.equal(found[2], found[1])


def test_another_backbones_states_are_never_taken(counted: Counted, rows: list[Tensor]) -> None:
    HiddenStates(BASE).fill(rows[:3], counted)
    for other in ({**BASE, "config.json": "b3"}, {"model.safetensors": "a1"}, {}):
        assert HiddenStates(other).folder != HiddenStates(BASE).folder
        assert HiddenStates(other).fill(rows[:3], counted) == 3


def test_a_row_that_begins_like_another_is_another(counted: Counted, backbone: Any) -> None:
    rows = [torch.tensor(ids) for ids in ([1, 2], [1, 2, 3], [1], [2, 1])]
    cache = HiddenStates(BASE)
    assert cache.fill(rows, counted) == 4
    check_states(cache, counted, backbone, rows)
    check_states(HiddenStates(BASE), counted, backbone, rows)


@pytest.mark.parametrize("left", [0, 5, -20])
def test_a_file_that_was_half_written_is_passed_over(
    counted: Counted, backbone: Any, rows: list[Tensor], left: int
) -> None:
    """Its rows are worked out again, and its name is written over."""
    HiddenStates(BASE).fill(rows, counted)
    (file,) = HiddenStates(BASE).folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    (file.parent / ".x.safetensors.77.partial").write_bytes(b"what a writer left that was killed")
    again = HiddenStates(BASE)
    assert again.fill(rows, counted) == 70
    check_states(again, counted, backbone, rows)
    assert file.read_bytes() == whole
    assert HiddenStates(BASE).fill(rows, counted) == 0


def test_a_folder_that_cannot_be_written_costs_time_alone(
    counted: Counted, backbone: Any, rows: list[Tensor], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    cache = HiddenStates(BASE)
    assert cache.fill(rows[:4], counted) == 4
    assert cache.unwritten is not None
    assert "hidden states were not kept" in cache.unwritten
    assert str(tmp_path / "cache") in cache.unwritten
    assert "PERDURE_CACHE" in cache.unwritten
    check_states(cache, counted, backbone, rows[:4])
    assert cache.fill(rows[:4], counted) == 0
    assert HiddenStates(BASE).fill(rows[:4], counted) == 4
    assert HiddenStates(BASE, tmp_path / "other").unwritten is None


def test_where_they_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache" / "hidden"
    assert HiddenStates(BASE).folder.parent == tmp_path / "cache" / "hidden"
    assert HiddenStates(BASE, tmp_path / "mine").folder.parent == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", None):
        monkeypatch.delenv("PERDURE_CACHE") if unset is None else monkeypatch.setenv("PERDURE_CACHE", unset)
        assert cache_folder() == tmp_path / "home" / ".cache" / "perdure" / "hidden"


def test_states_beyond_half_precision_are_refused(counted: Counted, rows: list[Tensor]) -> None:
    with pytest.raises(ModelError, match="too large for float16"):
        HiddenStates(BASE).fill(rows[:2], lambda x: 1e6 * counted(x))
    assert not HiddenStates(BASE).folder.exists()


def test_progress_is_told(counted: Counted, rows: list[Tensor]) -> None:
    told: list[tuple[int, int]] = []
    HiddenStates(BASE).fill(rows, counted, lambda done, of: told.append((done, of)))
    assert told == [(done, 70) for done in range(71)]


def test_in_half_precision_the_same_is_kept(backbone: Any, rows: list[Tensor]) -> None:
    """Who asks first, a run in bf16 or one in fp32, must not matter."""
    wide = Regressor(backbone, MHAR(16, hidden=8), HiddenStates(BASE))
    wide.remember(rows[:6])
    narrow = Regressor(backbone, MHAR(16, hidden=8), HiddenStates({}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow.remember(rows[:6])
        found = narrow.hidden(batch(rows[:6]))
    assert torch.equal(found, wide.hidden(batch(rows[:6])))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # without the guard it would differ
        assert not torch.equal(wide._states(batch(rows[:6])).float(), wide._frozen(batch(rows[:6])))


def test_a_file_is_named_by_its_rows(counted: Counted, rows: list[Tensor]) -> None:
    """Two runs that work the same rows out at once, in whatever order, write one file."""
    one = HiddenStates(BASE)
    one.fill(rows[:9], counted)
    names = {file.name for file in one.folder.iterdir()}
    other = HiddenStates(BASE)
    other._work_out(sorted((hidden.name_of(row), row) for row in rows[:9]), counted, lambda done, of: None)
    assert {file.name for file in one.folder.iterdir()} == names
