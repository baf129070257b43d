"""A backbone under a head: what is trained, what is frozen for good, dropout, padding, and what is written."""

from __future__ import annotations

import copy
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from perdure.errors import ModelError
from perdure.models.adapters import add_lora
from perdure.models.heads import MHAR, make_head
from perdure.models.hidden import HiddenStates
from perdure.models.objectives import PAD, collate, forward
from perdure.models.regressor import Regressor, _OneDNN
from perdure.types import Example


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_CACHE", str(tmp_path / "cache"))


def test_a_frozen_backbones_own_way_to_linear_layers_is_theirs() -> None:
    """oneDNN's products in place of PyTorch's, with and without a bias, to fp32's rounding; no others."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        pytest.skip("oneDNN is not asked on this processor")
    torch.manual_seed(1)
    with_bias, without = nn.Linear(24, 16), nn.Linear(16, 40, bias=False)
    x = torch.randn(1, 9, 24)
    with torch.no_grad():
        expected = without(with_bias(x))
        with Named() as named, _OneDNN():
            found = without(with_bias(x))
        assert named.operators.count("mkldnn::_linear_pointwise") == 2
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        others = (
            (x.double(), with_bias.weight.double(), with_bias.bias.double()),
            (x.bfloat16(), with_bias.weight.bfloat16(), None),
            (x, with_bias.weight[0], None),
            (x, with_bias.weight, torch.zeros(1)),
        )
        for given in others:
            plain = nn.functional.linear(*given)
            with Named() as named, _OneDNN():
                assert torch.equal(nn.functional.linear(*given), plain)
            assert "mkldnn::_linear_pointwise" not in named.operators


class Named(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func.name())
        return func(*args, **(kwargs or {}))


def bert(dropout: float = 0.3) -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.3, hidden_dropout_prob=dropout,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    return LlamaModel(config)


def head(name: str = "mhar", **changes: Any) -> nn.Module:
    torch.manual_seed(1)
    return make_head(name, 16, hidden=12, **changes)


def rows() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(0, 40, (n,), generator=rng) for n in (9, 2, 1, 6)]


def batch(given: list[Tensor]) -> Tensor:
    return pad_sequence(given, batch_first=True, padding_value=PAD)


def check_padding(model: nn.Module) -> None:
    """A row in a batch is foretold as it is alone."""
    model.eval()
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in rows()])
        assert alone.std() > 1e-3
        torch.testing.assert_close(model(batch(rows())), alone, rtol=0, atol=1e-6)


class WithoutMask(Regressor):
    """Wrong: the backbone takes padding for tokens."""

    def _states(self, x: Tensor) -> Tensor:
        states: Tensor = self.backbone(input_ids=x.clamp(min=0)).last_hidden_state
        return states


class WithoutHeadMask(Regressor):
    """Wrong: the head does."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.hidden(x), None)


@pytest.mark.parametrize("backbone", [bert, llama])
@pytest.mark.parametrize("name", ["mhar", "mean", "linear"])
def test_padding_changes_nothing(backbone: Any, name: str) -> None:
    check_padding(Regressor(backbone(), head(name)))
    with pytest.raises(AssertionError):
        check_padding(WithoutHeadMask(backbone(), head(name)))


def test_a_backbone_that_sees_padding_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_padding(WithoutMask(bert(), head()))


def test_rows_of_a_batch_are_padded_with_what_is_no_token() -> None:
    """Token 0 is a token: only PAD stands where a row has ended."""
    examples = [Example(str(i), x=row, y=torch.tensor(0.5)) for i, row in enumerate(rows())]
    made = collate(examples, "regression")
    assert made.x.shape == (4, 9)
    for row, padded in zip(rows(), made.x, strict=True):
        assert padded.tolist() == row.tolist() + [-1] * (9 - len(row))
    assert made.counts == (1, 1, 1, 1)
    assert collate(examples[:1], "regression").x.tolist() == [rows()[0].tolist()]
    model = Regressor(bert(), head(ensemble=2)).eval()
    output = forward(model, made)
    assert output.logits.shape == (4,)
    assert output.members is not None
    assert output.members.shape == (4, 2)


def test_a_frozen_backbone_stays_in_eval_mode_and_the_head_does_not() -> None:
    model = Regressor(bert(), head(), HiddenStates({}))
    model.train()
    assert model.head.training
    assert not any(module.training for module in model.backbone.modules())
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert all(p.requires_grad for p in model.head.parameters())
    x = batch(rows())
    assert torch.equal(model.hidden(x), model.hidden(x))
    assert not torch.equal(model(x), model(x))  # the head's dropout
    model.eval()
    assert torch.equal(model(x), model(x))
    live = Regressor(model.backbone, model.head).eval()
    torch.testing.assert_close(model(x), live(x), rtol=0, atol=1e-3)  # fp16


def test_a_backbone_that_is_trained_drops_in_training() -> None:
    model = Regressor(bert(dropout=0.5), head(dropout=0.0)).train()
    x = batch(rows())
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_reach_what_is_trained(checkpointed: bool) -> None:
    """Full: backbone and head. LoRA: its factors and the head."""
    full = Regressor(llama(), head(dropout=0.0)).train()
    tuned = add_lora(llama(), 2, 4, 0.0, None, generates=False)
    lora = Regressor(tuned, head(dropout=0.0)).train()
    for model in (full, lora):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(batch(rows())).sum().backward()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        missing = {name for name in trained - reached if "lora_A" not in name}  # B is 0, and A's gradient with it
        assert not missing
        assert reached <= trained
    assert all("lora" in name or name.startswith("head.") for name, p in lora.named_parameters() if p.requires_grad)
    assert any("lora_B" in name for name, p in lora.named_parameters() if p.requires_grad)


def test_a_frozen_backbone_saves_nothing_by_checkpoints() -> None:
    with pytest.raises(ModelError, match="frozen"):
        Regressor(bert(), head(), HiddenStates({})).gradient_checkpointing_enable()


def test_what_is_written_loads_again(tmp_path: Path) -> None:
    from transformers import BertModel

    model = Regressor(bert(), head()).eval()
    (tmp_path / "full").mkdir()
    model.save_pretrained(tmp_path / "full")
    other = MHAR(16, hidden=12)
    other.load_state_dict(load_file(tmp_path / "full" / "head.safetensors"))
    loaded = BertModel.from_pretrained(tmp_path / "full", add_pooling_layer=False)
    again = Regressor(loaded, other).eval()
    x = batch(rows())
    assert torch.equal(again(x), model(x))
    told = json.loads((tmp_path / "full" / "head.json").read_text())
    assert told["head"] == "MHAR"
    assert told["shapes"]["answer.hidden.weight"] == [12, 16]
    (tmp_path / "head").mkdir()
    Regressor(bert(), head(), HiddenStates({})).save_pretrained(tmp_path / "head")
    assert {path.name for path in (tmp_path / "head").iterdir()} == {"head.safetensors", "head.json"}


def test_a_copy_has_the_same_rows_and_its_own_head() -> None:
    model = Regressor(bert(), head(), HiddenStates({})).eval()
    x = batch(rows())
    model.remember(rows())
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    with torch.no_grad():
        next(other.head.parameters()).add_(1.0)
    assert not torch.equal(other(x), model(x))
