"""Checkpoints: what goes in comes out, nothing is pickled; what is torn, altered or newer is refused in words."""

from __future__ import annotations

import errno
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from perdure.config import FORMAT
from perdure.errors import RunError, StorageError
from perdure.sealed import PLAIN, TENSORS
from perdure.storage import file_hash
from perdure.training.checkpoint import load, save


def state() -> dict[str, Any]:
    return {
        "model": {"a.weight": torch.randn(3, 4), "flat": torch.arange(5), "scalar": torch.tensor(2.5)},
        "half": torch.randn(3).bfloat16(),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "nested": [{"x": torch.ones(2)}, [1, 2.5, "text", None, True]],
        "plain": {"steps": 7, "nan": math.nan, "infinite": math.inf, "nothing": {}, "none": None},
    }


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and (one == two or (one != one and two != two))


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    given = state()
    save(tmp_path / "saved", given)
    assert same(load(tmp_path / "saved"), given)


def test_shared_and_strided_tensors(tmp_path: Path) -> None:
    """Tied tensors are refused by the format itself; here each comes back whole, a transposed one too."""
    tied = torch.arange(6.0).view(2, 3)
    given = {"one": tied, "two": tied, "turned": tied.T, "part": tied[:, 1], "trained": torch.nn.Parameter(tied)}
    save(tmp_path / "saved", given)
    found = load(tmp_path / "saved")
    assert all(torch.equal(found[name], value) for name, value in given.items())
    assert not found["trained"].requires_grad


def test_names_that_would_meet_are_kept_apart(tmp_path: Path) -> None:
    given = {"a/b": torch.ones(1), "a": {"b": torch.zeros(2), "b'": torch.ones(3)}}
    save(tmp_path / "saved", given)
    assert same(load(tmp_path / "saved"), given)


def test_tuples_come_back_as_lists(tmp_path: Path) -> None:
    save(tmp_path / "saved", {"t": (1, torch.ones(1))})
    assert load(tmp_path / "saved") == {"t": [1, torch.ones(1)]}


def test_safetensors_and_json_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickled")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    save(tmp_path / "saved", state())
    load(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").rglob("*")) == [PLAIN, TENSORS]
    record = json.loads((tmp_path / "saved" / PLAIN).read_text())
    assert record["format"] == FORMAT
    assert record["sha256"] == file_hash(tmp_path / "saved" / TENSORS)
    with safe_open(tmp_path / "saved" / TENSORS, "pt") as tensors:
        assert len(tensors.keys()) == 7


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"a": {"b": [1, object()]}}, "state at 'a/b/1': a object can be saved neither as a tensor nor as JSON"),
        ({"a": {1: 2}}, "state at a: keys must be strings"),
        ({1: 2}, "state at the top: keys must be strings"),
        ({"a": {1, 2}}, "state at 'a': a set can"),
    ],
)
def test_what_cannot_be_saved_is_named_before_anything_is_written(tmp_path: Path, given: Any, where: str) -> None:
    with pytest.raises(TypeError) as caught:
        save(tmp_path / "saved", given)
    assert where in str(caught.value)
    assert not list(tmp_path.iterdir())


def refused(path: Path) -> str:
    with pytest.raises(RunError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_altered_tensors_are_refused(tmp_path: Path) -> None:
    """One bit of the last value."""
    save(tmp_path / "saved", state())
    tensors = tmp_path / "saved" / TENSORS
    raw = bytearray(tensors.read_bytes())
    raw[-1] ^= 1
    tensors.write_bytes(raw)
    assert f"{TENSORS} does not have the checksum that was written with it" in refused(tmp_path / "saved")


def test_altered_plain_values_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "saved", state())
    plain = tmp_path / "saved" / PLAIN
    plain.write_text(plain.read_text().replace('"steps": 7', '"steps": 8'))
    assert f"{PLAIN} does not have the checksum that was written with it" in refused(tmp_path / "saved")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "saved", state())
    record = json.loads((tmp_path / "saved" / PLAIN).read_text())
    (tmp_path / "saved" / PLAIN).write_text(json.dumps({**record, "format": FORMAT + 1}))
    text = refused(tmp_path / "saved")
    assert f"format {FORMAT + 1} is newer than this perdure reads" in text
    assert "upgrade perdure" in text


@pytest.mark.parametrize("name", [PLAIN, TENSORS])
@pytest.mark.parametrize("size", [None, 0, 20])
def test_torn_checkpoints_are_refused(tmp_path: Path, name: str, size: int | None) -> None:
    save(tmp_path / "saved", state())
    torn = tmp_path / "saved" / name
    if size is None:
        torn.unlink()
    else:
        torn.write_bytes(torn.read_bytes()[:size])
    refused(tmp_path / "saved")


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"format": 1}', '{"format": "x", "sha256": ""}', "\xff"])
def test_a_foreign_state_file_is_refused(tmp_path: Path, text: str) -> None:
    save(tmp_path / "saved", state())
    (tmp_path / "saved" / PLAIN).write_bytes(text.encode("latin-1"))
    assert "not a readable checkpoint" in refused(tmp_path / "saved")


def test_nothing_there(tmp_path: Path) -> None:
    assert "not a readable checkpoint" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize("where", ["tensors", "state", "sync"])
def test_a_full_disk_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = tmp_path / "saved"
    save(path, {"n": 1, "t": torch.ones(3)})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {
        "tensors": "safetensors.torch.save_file",
        "state": "perdure.sealed.json.dumps",
        "sync": "perdure.storage.sync",
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        with pytest.raises(StorageError, match="the disk is full"):
            save(path, {"n": 2, "t": torch.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert load(path)["n"] == 1
    save(path, {"n": 3})
    assert load(path)["n"] == 3


def test_the_formats_own_error_is_a_refused_write_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Safetensors reports a full disk as its own exception, which is no OSError."""
    from safetensors import SafetensorError

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match="the disk is full"):
        save(tmp_path / "saved", {"t": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_a_save_that_was_killed_leaves_the_old_one(tmp_path: Path) -> None:
    """A half-filled folder aside, as a killed process leaves it, is no checkpoint; the next save clears it."""
    path = tmp_path / "saved"
    save(path, {"n": 1})
    aside = tmp_path / ".saved.partial"
    aside.mkdir()
    (aside / TENSORS).write_bytes(b"half")
    assert load(path) == {"n": 1}
    save(path, {"n": 2})
    assert load(path) == {"n": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_keys_that_mean_something_to_the_format_come_back(tmp_path: Path) -> None:
    state = {"rows": [{"__tensor__": "x"}, {"__pairs__": [["a", 1]], "t": torch.ones(2)}], "__tensor__": 3}
    save(tmp_path / "c", state)
    back = load(tmp_path / "c")
    assert back["rows"][0] == {"__tensor__": "x"}
    assert back["rows"][1]["__pairs__"] == [["a", 1]]
    assert torch.equal(back["rows"][1]["t"], torch.ones(2))
    assert back["__tensor__"] == 3


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "c", {"t": torch.ones(2)})
    (tmp_path / "c" / PLAIN).write_text("[" * 100_000)
    with pytest.raises(RunError, match="not a readable checkpoint"):
        load(tmp_path / "c")
