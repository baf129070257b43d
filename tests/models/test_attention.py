"""Dense attention in bf16 against softmax(QKᵀ/√D)V in fp64, and where it leaves the work to PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perdure.models import attention
from perdure.models.attention import NAME, attend
from perdure.models.load import load

CAUSAL = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)
BOTH_WAYS = SimpleNamespace(is_causal=False, num_key_value_groups=2, training=False)


def by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Row by row and head by head, in fp64: [B, T, H, D]; without `seen`, [B, T, S], up to a query's own place."""
    B, H, T, D = q.shape
    out = torch.zeros(B, T, H, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            for t in range(T):
                keys = [s for s in range(T) if (s <= t if seen is None else seen[b, t, s])]
                scores = torch.stack([q[b, h, t].double() @ k[b, g, s].double() * scaling for s in keys])
                out[b, t, h] = torch.softmax(scores, 0) @ v[b, g, keys].double()
    return out


def tensors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)


def check() -> None:
    q, k, v = (x.bfloat16() for x in tensors())
    with torch.autocast("cpu", torch.bfloat16):
        found, weights = attend(CAUSAL, q, k, v, None, scaling=0.5)
    assert weights is None
    assert found.shape == (2, 7, 4, 8)
    torch.testing.assert_close(found.double(), by_hand(q, k, v, 0.5), rtol=0.03, atol=0.03)


def test_it_is_softmax_of_the_scores() -> None:
    check()


def test_wrong_versions_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._banded
    wrong = {
        "sees what is to come": lambda q, k, v, m, s, p: right(q.flip(2), k.flip(2), v.flip(2), m, s, p).flip(1),
        "groups turned": lambda q, k, v, m, s, p: right(q, k.flip(1), v.flip(1), m, s, p),
        "scaled twice": lambda q, k, v, m, s, p: right(q, k, v, m, s * s, p),
        "heads for places": lambda q, k, v, m, s, p: right(q, k, v, m, s, p).transpose(1, 2).reshape(2, 7, 4, 8),
    }
    for version in wrong.values():
        monkeypatch.setattr(attention, "_banded", version)
        with pytest.raises(AssertionError):
            check()


def gradients(monkeypatch: pytest.MonkeyPatch, band: int) -> tuple[torch.Tensor, ...]:
    monkeypatch.setattr(attention, "BAND", band)
    inputs = [x.requires_grad_() for x in tensors()]
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attend(CAUSAL, *inputs, None, scaling=0.5)
    weight = torch.linspace(-1, 1, found.numel()).view(found.shape)
    return found.detach(), *torch.autograd.grad((found.float() * weight).sum(), inputs)


@pytest.mark.parametrize("band", [1, 3, 6])
def test_bands_are_the_whole_cut_into_pieces(monkeypatch: pytest.MonkeyPatch, band: int) -> None:
    """7 queries in bands of 3 see 3, 6 and 7 positions; what is left out of a row has weight 0 in the whole."""
    whole, parts = gradients(monkeypatch, 7), gradients(monkeypatch, band)
    torch.testing.assert_close(parts[0], whole[0], rtol=0.01, atol=0.004)  # a bf16 number has 8 bits
    for one, other in zip(parts[1:], whole[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03)
    q, k, v = (x.bfloat16() for x in tensors())
    torch.testing.assert_close(parts[0].double(), by_hand(q, k, v, 0.5), rtol=0.03, atol=0.03)


def error_of(change: Callable[[torch.Tensor, torch.Tensor], None], mask: torch.Tensor | None = None) -> float:
    """How far answers to changed queries and keys are off: root mean square, of values of 1."""
    q, k, v = tensors()
    change(q, k)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    found, _ = attend(CAUSAL, q, k, v, mask, scaling=0.5)
    seen = torch.ones(2, 7, 7, dtype=torch.bool).tril() if mask is None else mask[:, 0]
    sees = seen.any(-1)
    wrong = found.double() - by_hand(q, k, v, 0.5, seen | ~sees[..., None])
    return float(wrong[sees].square().mean().sqrt())


def biased(q: torch.Tensor, k: torch.Tensor) -> None:
    """The keys of each head of each row share a bias: scores of up to 500, which bf16 knows to the nearest 2."""
    sizes = torch.tensor([[200.0, -100.0], [140.0, 240.0]])
    k[..., 1] += sizes[..., None]
    k[..., 2] -= sizes[..., None]


def outlying(q: torch.Tensor, k: torch.Tensor) -> None:
    """The first key alone is large, and no query likes it; the others' scores are small."""
    q[..., 0] += 6
    k[:, :, 0, 0] = -40


def padded_left(q: torch.Tensor, k: torch.Tensor) -> None:
    """The first two keys are padding, alike and far from the others."""
    q[..., 0] += 6
    k[:, :, :2, 0] = -40


LEFT = (torch.ones(7, 7, dtype=torch.bool).tril() & (torch.arange(7) > 1)).expand(2, 1, 7, 7)


@pytest.mark.parametrize(
    ("change", "mask"),
    [
        (lambda q, k: None, None),
        (biased, None),
        (biased, torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()),
        (outlying, None),
        (padded_left, LEFT),
    ],
    ids=["plain", "biased", "biased, with a mask", "outlying", "padded left"],
)
def test_what_keys_share_costs_no_precision(
    monkeypatch: pytest.MonkeyPatch, change: Callable[..., None], mask: torch.Tensor | None
) -> None:
    assert error_of(change, mask) < 0.006
    if change is biased:
        monkeypatch.setattr(attention, "LARGE", float("inf"))
        assert error_of(change, mask) > 0.05


def test_wrong_versions_of_what_keys_share_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._centred
    monkeypatch.setattr(attention, "_centred", lambda k, mask: k - k[:, :, :1])
    assert error_of(outlying) > 0.008
    monkeypatch.setattr(attention, "_centred", lambda k, mask: k - k[:1, :, :1])
    assert error_of(biased) > 0.05
    monkeypatch.setattr(attention, "_centred", lambda k, mask: right(k, None))
    assert error_of(padded_left, LEFT) > 0.008


def test_gradients_where_keys_have_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of PyTorch in fp32, also of the first key, which is taken off the others."""
    found: list[tuple[torch.Tensor, ...]] = []
    for fast in (True, False):
        q, k, v = tensors()
        inputs = [x.bfloat16().float().requires_grad_() for x in (q, k + 40 * (torch.arange(8) == 2), v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            out, _ = attend(CAUSAL, *inputs, None, scaling=0.5)
        weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
        found.append(torch.autograd.grad((out.float() * weight).sum(), inputs))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03)


def test_a_band_that_sees_as_far_as_the_first_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._band
    monkeypatch.setattr(attention, "BAND", 3)
    check()
    monkeypatch.setattr(attention, "_band", lambda q, k, v, start, scale, p: right(q[:, start:], k, v, 0, scale, p))
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(
    ("change", "dense"),
    [
        ({}, True),
        ({"mask": torch.ones(2, 1, 7, 7, dtype=torch.bool)}, True),
        ({"mask": torch.ones(1, 1, 7, 7, dtype=torch.bool)}, True),
        ({"mask": torch.ones(2, 4, 7, 7, dtype=torch.bool)}, False),
        ({"mask": torch.ones(2, 7, dtype=torch.bool)}, False),
        ({"mask": torch.zeros(2, 1, 7, 7)}, False),
        ({"mask": torch.ones(2, 1, 7, 7, dtype=torch.int64)}, False),
        ({"dropout": 0.1}, True),
        ({"is_causal": False}, True),
        ({"keys": 9}, False),
        ({"position_bias": torch.zeros(1)}, False),
        ({"softcap": 30.0}, False),
        ({"indices": torch.zeros(2, 7, 3)}, False),
        ({"double": True}, False),
        ({"precision": torch.float32}, False),
    ],
    ids=str,
)
def test_what_it_leaves_to_pytorch(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], dense: bool) -> None:
    q, k, v = tensors()
    if "keys" in change:
        k, v = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    called: list[int] = []
    for rule in ("_banded", "_whole"):
        monkeypatch.setattr(attention, rule, lambda *_: called.append(1) or q)
    monkeypatch.setattr(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward", lambda *_, **__: (q, None)
    )
    if "double" in change:
        q, k, v = q.double(), k.double(), v.double()
    options = {name: value for name, value in change.items() if name not in ("mask", "keys", "precision", "double")}
    with torch.autocast("cpu", torch.bfloat16, enabled=change.get("precision") is None):
        attend(CAUSAL, q, k, v, change.get("mask"), scaling=0.5, **options)
    assert bool(called) is dense


def test_models_load_with_it_and_fp32_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 nano's logits are those of PyTorch's attention to the bit; in bf16 they agree as bf16 does."""
    nano, plain = load("nano").model, load("nano", "sdpa").model
    assert nano.config._attn_implementation == NAME
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        one, two = nano(input_ids=ids).logits, plain(input_ids=ids).logits
        assert torch.equal(one, two)
        with torch.autocast("cpu", torch.bfloat16):
            one, two = nano(input_ids=ids, use_cache=False).logits, plain(input_ids=ids, use_cache=False).logits
    assert not torch.equal(one, two)
    assert float((one.softmax(-1) - two.softmax(-1)).abs().max()) < 0.05


@pytest.mark.parametrize("scores", [1, 4 * 49, 1 << 20])
def test_without_gradients_rows_go_in_groups(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    """Of five rows one, one and all go together; no limit on a batch's scores holds, but that on a row's."""
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 4, 7, 8), torch.randn(5, 2, 7, 8), torch.randn(5, 2, 7, 8)
    monkeypatch.setattr(attention, "CACHED_SCORES", scores)
    monkeypatch.setattr(attention, "MOST_SCORES", 4 * 49)
    with torch.autocast("cpu", torch.bfloat16):
        assert not attention._dense(q, k, None, {})
        with torch.no_grad():
            assert attention._dense(q, k, None, {})
            found, _ = attend(CAUSAL, q, k, v, None, scaling=0.5)
            monkeypatch.setattr(attention, "MOST_SCORES", 4 * 48)
            assert not attention._dense(q, k, None, {})
    q, k, v = (x.bfloat16() for x in (q, k, v))
    torch.testing.assert_close(found.double(), by_hand(q, k, v, 0.5), rtol=0.03, atol=0.03)


def check_single(precision: torch.dtype) -> None:
    """The last of seven places asks alone."""
    q, k, v = (x.to(precision) for x in tensors())
    found, weights = attend(CAUSAL, q[:, :, -1:], k, v, None, scaling=0.5)
    assert weights is None
    assert found.shape == (2, 1, 4, 8)
    close = {"rtol": 0.03, "atol": 0.03} if precision == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.double(), by_hand(q, k, v, 0.5)[:, -1:], **close)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_token_that_is_generated_needs_no_copy_of_the_keys(
    monkeypatch: pytest.MonkeyPatch, precision: torch.dtype
) -> None:
    monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", None)
    check_single(precision)
    right = attention._grouped
    wrong = {
        "groups turned": lambda q, k, v, s: right(q, k.flip(1), v.flip(1), s),
        "heads of a group apart": lambda q, k, v, s: right(q[:, [0, 2, 1, 3]], k, v, s),
        "unscaled": lambda q, k, v, s: right(q, k, v, None),
        "the last key left out": lambda q, k, v, s: right(q, k[:, :, :-1], v[:, :, :-1], s),
    }
    for version in wrong.values():
        monkeypatch.setattr(attention, "_grouped", version)
        with pytest.raises(AssertionError):
            check_single(precision)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, 1, 7, dtype=torch.bool)])
def test_one_query_for_all_rows_or_a_mask_are_left_to_pytorch(
    monkeypatch: pytest.MonkeyPatch, mask: torch.Tensor | None
) -> None:
    called: list[int] = []
    monkeypatch.setattr(attention, "_grouped", lambda *_: called.append(1))
    q, k, v = tensors()
    found, _ = attend(CAUSAL, q[: 1 if mask is None else 2, :, -1:], k, v, mask, scaling=0.5)
    assert not called
    assert found.shape == (2, 1, 4, 8)


def padded(batch: int = 2) -> torch.Tensor:
    """Of the first row two keys are padding: [B, 1, T, S], as Transformers makes it."""
    seen = torch.ones(batch, 1, 7, 7, dtype=torch.bool)
    seen[0, ..., 5:] = False
    return seen


def triangles() -> torch.Tensor:
    """Causal, and padded on top: what a decoder is given for rows of unlike lengths."""
    return padded() & torch.ones(7, 7, dtype=torch.bool).tril()


def check_masked(module: Any, mask: torch.Tensor | None, seen: torch.Tensor) -> None:
    q, k, v = (x.bfloat16() for x in tensors())
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attend(module, q, k, v, mask, scaling=0.5)
    right = by_hand(q, k, v, 0.5, seen.expand(2, 1, 7, 7)[:, 0])
    torch.testing.assert_close(found.double(), right, rtol=0.03, atol=0.03)


EVERYTHING = torch.ones(1, 1, 7, 7, dtype=torch.bool)


@pytest.mark.parametrize(
    ("module", "mask", "seen"),
    [
        (BOTH_WAYS, None, EVERYTHING),
        (BOTH_WAYS, padded(), padded()),
        (CAUSAL, triangles(), triangles()),
        (CAUSAL, EVERYTHING.tril(), EVERYTHING.tril()),
    ],
    ids=["no mask", "padding", "causal and padding", "one mask for all rows"],
)
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("scores", [1, 1 << 22])
def test_under_a_mask(
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    mask: torch.Tensor | None,
    seen: torch.Tensor,
    gradients: bool,
    scores: int,
) -> None:
    monkeypatch.setattr(attention, "CACHED_SCORES", scores)  # without gradients one row at a time, and all
    with torch.set_grad_enabled(gradients):
        check_masked(module, mask, seen)


def test_wrong_versions_under_a_mask_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._whole
    wrong = {
        "padding is seen": lambda q, k, v, m, s, p: right(q, k, v, None, s, p),
        "turned around": lambda q, k, v, m, s, p: right(q, k, v, m.logical_not(), s, p),
        "keys for queries": lambda q, k, v, m, s, p: right(q, k, v, m.transpose(2, 3), s, p),
        "another row's": lambda q, k, v, m, s, p: right(q, k, v, m.flip(0), s, p),
        "scaled twice": lambda q, k, v, m, s, p: right(q, k, v, m, s * s, p),
    }
    check_masked(CAUSAL, triangles(), triangles())
    for version in wrong.values():
        monkeypatch.setattr(attention, "_whole", version)
        with pytest.raises(AssertionError):
            check_masked(CAUSAL, triangles(), triangles())


def test_gradients_under_a_mask_are_pytorchs() -> None:
    found, right = [], []
    for scores, fast in ((found, True), (right, False)):
        inputs = [x.requires_grad_() for x in tensors()]
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            out, _ = attend(BOTH_WAYS, *inputs, padded(), scaling=0.5)
        weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
        scores.extend(torch.autograd.grad((out.float() * weight).sum(), inputs))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03)


def test_a_query_that_sees_nothing_is_a_number() -> None:
    seen = padded()
    seen[0] = False
    q, k, v = (x.bfloat16() for x in tensors())
    found, _ = attend(BOTH_WAYS, q, k, v, seen, scaling=0.5)
    right = by_hand(q, k, v, 0.5, torch.ones(2, 7, 7, dtype=torch.bool))
    torch.testing.assert_close(found[1].double(), right[1], rtol=0.03, atol=0.03)
    mean = v[0].double().mean(1).repeat_interleave(2, 0)  # over the keys, for each head
    torch.testing.assert_close(found[0].double(), mean.expand(7, 4, 8), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("module", [CAUSAL, BOTH_WAYS], ids=["causal", "both ways"])
def test_weights_are_dropped_after_the_softmax(module: Any) -> None:
    """With values of 1 and p = 0.25 an answer is the sum of what is kept of the weights, over 0.75: 1 in the mean.

    Over 4,000 rows of 7 places in 4 heads its mean is off by less than 0.01; a row of one key is 0 or 4/3.
    """
    torch.manual_seed(0)
    q, k = torch.randn(4000, 4, 7, 8), torch.randn(4000, 4, 7, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, _ = attend(module, q, k, torch.ones(4000, 4, 7, 8), None, scaling=0.5, dropout=0.25)
        torch.manual_seed(1)
        again, _ = attend(module, q, k, torch.ones(4000, 4, 7, 8), None, scaling=0.5, dropout=0.25)
        torch.manual_seed(1)
        same, _ = attend(module, q, k, torch.ones(4000, 4, 7, 8), None, scaling=0.5, dropout=0.25)
    assert abs(float(found.float().mean()) - 1) < 0.01
    assert torch.equal(again, same)
    assert not torch.equal(found, again)
    if module is CAUSAL:
        first = found[:, 0].float()
        assert sorted(set(first.flatten().tolist())) == [0.0, pytest.approx(4 / 3, rel=0.004)]
        assert abs(float((first == 0).float().mean()) - 0.25) < 0.01


def test_an_encoder_with_padding_and_dropout() -> None:
    """A small BERT: fp32 as PyTorch's to the bit; bf16 as bf16 agrees; in training its attention is dropped."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    small |= {"vocab_size": 50, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.5}
    fast, plain = (BertModel(BertConfig(initializer_range=0.3, **small)).eval() for _ in range(2))
    plain.load_state_dict(fast.state_dict())
    attention.use(fast)
    assert (fast.config._attn_implementation, plain.config._attn_implementation) == (NAME, "sdpa")
    ids = torch.arange(24).view(2, 12)
    seen = torch.ones(2, 12, dtype=torch.int64)
    seen[1, 7:] = 0
    with torch.no_grad():
        one, two = (m(input_ids=ids, attention_mask=seen).last_hidden_state for m in (fast, plain))
        assert torch.equal(one, two)
        with torch.autocast("cpu", torch.bfloat16):
            one, two = (m(input_ids=ids, attention_mask=seen).last_hidden_state for m in (fast, plain))
            short = fast(input_ids=ids[1:, :7]).last_hidden_state
            dropped = fast.train()(input_ids=ids, attention_mask=seen).last_hidden_state
    assert not torch.equal(one, two)
    torch.testing.assert_close(one, two, rtol=0.05, atol=0.05)
    torch.testing.assert_close(one[1:, :7], short, rtol=0.05, atol=0.05)
    assert float((dropped - one).std()) > 0.2


def test_draws_are_the_same_with_and_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bands of queries, and scores of all rows that would be too many to go at once without gradients."""
    monkeypatch.setattr(attention, "BAND", 4)
    monkeypatch.setattr(attention, "CACHED_SCORES", 4 * 49)
    found = []
    for gradients in (True, False):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
            found.append(attend(CAUSAL, *tensors(), None, scaling=0.5, dropout=0.25)[0])
    assert torch.equal(*found)
    monkeypatch.setattr(attention, "MOST_SCORES", 2 * 4 * 49 - 1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert not attention._dense(*tensors()[:2], None, {"dropout": 0.25})
        assert attention._dense(*tensors()[:2], None, {})


def test_another_default_device_changes_nothing() -> None:
    q, k, v = (x.bfloat16() for x in tensors())
    found = []
    for device in ("cpu", "meta"):
        torch.manual_seed(3)
        with torch.device(device):
            found.append(attend(CAUSAL, q, k, v, None, scaling=0.5, dropout=0.25)[0])
    assert torch.equal(*found)


def sparse() -> Any:
    """A decoder that looks at the four keys of each query that an indexer of its own finds the best."""
    pytest.importorskip("transformers.models.deepseek_v32")
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4}
    sizes |= {
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 2,
        "q_lora_rank": 16,
    }
    sizes |= {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_topk": 4}
    sizes |= {"index_n_heads": 2, "index_head_dim": 16, "max_position_embeddings": 64}
    return DeepseekV32ForCausalLM(DeepseekV32Config(**sizes)).eval()


def test_an_architecture_that_goes_by_the_name_of_its_attention_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under another name it would look at every key, without a word."""
    model, ids = sparse(), torch.arange(5, 45)[None]
    with torch.no_grad():
        right = model(input_ids=ids).logits
        attention.use(model)
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(input_ids=ids).logits, right)
        monkeypatch.setattr(attention, "_COMPARED", re.compile("never so"))
        attention.use(model)
        assert model.config._attn_implementation == NAME
        assert float((model(input_ids=ids).logits - right).abs().max()) > 0.01


def test_other_attention_is_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """That of an architecture of its own, and a model of which a part is told to be eager."""
    from transformers import BertConfig, BertModel, FalconConfig, FalconModel

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
    falcon = FalconModel(FalconConfig(**small))
    attention.use(falcon)
    assert falcon.config._attn_implementation == "sdpa"
    whole, part = (BertModel(BertConfig(intermediate_size=64, **small)) for _ in range(2))
    part.set_attn_implementation("eager")
    whole.part = part
    attention.use(whole)
    assert (whole.config._attn_implementation, part.config._attn_implementation) == ("sdpa", "eager")
    assert capfd.readouterr() == ("", "")
