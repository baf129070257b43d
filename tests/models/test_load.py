"""Finding models: embedded, in a folder, on the hub; and what is said where there is none."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perdure.errors import ModelError
from perdure.models import load as room
from perdure.models.load import NANO, load, max_positions, resolve


@pytest.fixture(scope="module")
def saved(make_lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as `save_pretrained` writes it, in half precision."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model") / "tiny"
    make_lm("llama").half().save_pretrained(path)
    words = {f"w{i}": i for i in range(37)} | {"<s>": 37, "</s>": 38, "?": 39}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return path


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refused(name: str) -> str:
    with pytest.raises(ModelError) as caught:
        load(name)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_local_folder(saved: Path) -> None:
    found = load(str(saved))
    assert (found.name, found.source, found.max_length) == (str(saved), str(saved.resolve()), 64)
    assert found.model.dtype == torch.float32
    assert not found.model.training
    assert found.tokenizer("w1 w2")["input_ids"] == [1, 2]
    for name, value in load_file(saved / "model.safetensors").items():
        assert torch.equal(found.model.state_dict()[name], value.float()), name


def test_a_relative_folder_and_the_home_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    assert resolve("tiny") == str(saved.resolve())
    assert resolve("./tiny/") == str(saved.resolve())
    monkeypatch.setenv("HOME", str(saved.parent))
    assert resolve("~/tiny") == str(saved.resolve())


def test_the_attention_can_be_chosen(saved: Path) -> None:
    assert load(str(saved), attention="eager").model.config._attn_implementation == "eager"


def test_the_embedded_model() -> None:
    if not (NANO / "config.json").is_file():
        pytest.skip("nano has not been made yet: make nano")
    found = load("nano")
    assert found.source == str(NANO)
    assert found.tokenizer.eos_token_id is not None
    assert found.max_length == found.model.config.max_position_embeddings


def test_real_models(stories260k: Path) -> None:
    found = load(str(stories260k))
    assert 200_000 < sum(p.numel() for p in found.model.parameters()) < 350_000
    assert found.tokenizer.decode(found.tokenizer("Once upon a time")["input_ids"], skip_special_tokens=True) == (
        "Once upon a time"
    )


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    assert f"model folder {str(tmp_path)!r} holds no config.json" in refused(str(tmp_path))


def test_a_folder_without_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    text = refused(str(copied))
    assert "holds no weights (model.safetensors; pickled .bin weights are refused)" in text
    assert "save_pretrained" in text


def test_pickled_weights_are_never_read(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    canary = copied / "canary"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (canary,))

    torch.save(Evil(), copied / "pytorch_model.bin")
    assert "pickled .bin weights are refused" in refused(str(copied))
    assert not canary.exists()


def test_a_folder_without_a_tokenizer(copied: Path) -> None:
    for path in copied.glob("tokenizer*"):
        path.unlink()
    assert "holds no tokenizer (tokenizer.json)" in refused(str(copied))


def test_torn_weights(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"model folder {str(copied)!r} cannot be loaded: " in refused(str(copied))


def test_a_config_that_is_no_causal_lm(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "no-such-kind"}))
    assert "cannot be loaded: " in refused(str(copied))


def test_remote_code_is_not_run(copied: Path) -> None:
    canary = copied / "canary"
    (copied / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass C: ...\n")
    config = json.loads((copied / "config.json").read_text())
    config.update(model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"})
    (copied / "config.json").write_text(json.dumps(config))
    assert "cannot be loaded: " in refused(str(copied))
    assert not canary.exists()


def test_a_tokenizer_without_an_end(copied: Path) -> None:
    path = copied / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    (copied / "special_tokens_map.json").unlink(missing_ok=True)
    assert "its tokenizer has no end-of-sequence token" in refused(str(copied))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such", "no-such-model", "a/b/c"])
def test_what_can_be_neither_folder_nor_hub_name(name: str) -> None:
    text = refused(name)
    assert text.startswith(
        f"model {name!r} is not a folder here, not a hub name (owner/name), and not embedded (nano)"
    )
    assert "--model" in text


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is not a folder here" in refused(str(tmp_path / "file"))


@pytest.fixture(params=["refuses", "is silent"])
def dead_hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that refuses connections, or takes them and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "is silent":
            server.listen(8)
            monkeypatch.setattr(room, "HUB_SECONDS", 1.0)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield


@pytest.mark.usefixtures("dead_hub")
def test_a_hub_that_cannot_be_reached_is_said_soon() -> None:
    """The hub's own client tries six times over 26 s; here it is one try of at most HUB_SECONDS."""
    assert room.HUB_SECONDS <= 8
    start = time.perf_counter()
    text = refused("nobody-here/no-such-model")
    assert time.perf_counter() - start < 10
    assert text.startswith(
        "model 'nobody-here/no-such-model' is not a folder here and could not be fetched from the hub"
    )
    assert "the hub cannot be reached" in text
    assert "give the folder's path with --model" in text


def test_longest_sequence(make_lm: Any) -> None:
    assert max_positions(make_lm("llama", max_position_embeddings=96)) == 96

    class Odd:
        class config:
            @staticmethod
            def get_text_config() -> object:
                return object()

    assert max_positions(Odd) == 2048
