"""Porting: the same bytes there and back in every layout, little memory, and errors in words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from perdure.errors import ModelError, NewerFormatError, PerdureError
from perdure.jax import layouts, load
from perdure.jax import port as module
from perdure.jax.layouts import Cut
from perdure.jax.port import port
from perdure.jax.tensors import read_header


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def sharded(make_mistral: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bfloat16 weights in several shards, with files of a tokenizer beside them."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    make_mistral(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "README.md").write_text("not needed")
    (folder / "model.safetensors.index.json.bak").write_text("not needed")
    return folder


@pytest.fixture(scope="module")
def own(huggingface: Path) -> Path:
    """The small model in Mistral's own layout."""
    return port(huggingface, huggingface.with_name("own"), "mistral")


@pytest.mark.parametrize("where", ["huggingface", "sharded"])
def test_there_and_back_gives_the_same_files(where: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(where)
    port(source, tmp_path / "there")
    port(tmp_path / "there", tmp_path / "back", "huggingface")
    before, after = contents(source), contents(tmp_path / "back")
    for name in ("README.md", "model.safetensors.index.json.bak"):
        before.pop(name, None)
    assert after == before
    assert (len(before) > 5) == (where == "sharded")


def test_bfloat16_stays(sharded: Path, tmp_path: Path, ids: Any) -> None:
    port(sharded, tmp_path / "a")
    header = read_header(tmp_path / "a" / "weights.safetensors")
    assert {tensor.dtype for tensor in header.tensors.values()} == {"BF16"}
    assert header.tensors["layers.mlp.gate.weight"].shape == (3, 40, 32)
    model = load(tmp_path / "a", "float32")
    from transformers import MistralForCausalLM

    theirs = MistralForCausalLM.from_pretrained(sharded, dtype=torch.float32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids).long()).logits.numpy()
    assert np.abs(np.asarray(model(ids)) - wanted).max() < 1e-4
    assert load(tmp_path / "a").dtype == "bfloat16"


def test_rotary_rows_by_hand() -> None:
    """One head of four rows a b c d: Mistral turns (a, b) and (c, d), Hugging Face (a, c) and (b, d).

    Row 2i of a pair goes to row i, row 2i + 1 to row i + 2: a b c d becomes a c b d, and so it goes back.
    """
    rows = np.array([10, 11, 12, 13, 20, 21, 22, 23], np.float32)[:, None]
    path = "layers.attention.query.weight"

    class Here:
        shape, size = (8, 1), 32

        @staticmethod
        def pieces(at_most: int) -> Any:
            yield from (rows.tobytes()[i : i + at_most] for i in range(0, 32, at_most))

    stored: Any = Here()
    turned = b"".join(Cut(stored).turned(path, "halves", 4).pieces())
    assert np.frombuffer(turned, np.float32).tolist() == [10, 12, 11, 13, 20, 22, 21, 23]
    assert Cut(stored).turned(path, "halves", 4).turned(path, "pairs", 4).turn == "keep"
    assert Cut(stored).turned("layers.attention.value.weight", "halves", 4).turn == "keep"


def mistrals_own(weights: dict[str, torch.Tensor], ids: torch.Tensor, p: dict[str, Any]) -> torch.Tensor:
    """Logits by Mistral's own rules, written down from its reference: complex rotary numbers on adjacent pairs."""
    x = weights["tok_embeddings.weight"][ids]
    length, width = len(ids), p["head_dim"]
    frequencies = 1.0 / p["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    turn = torch.polar(torch.ones(length, width // 2), torch.outer(torch.arange(length).float(), frequencies))[
        :, None
    ]
    past = torch.arange(length)[:, None] - torch.arange(length)
    seen = (past >= 0) & (past < p["sliding_window"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + p["norm_eps"]) * weights[name]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(length, -1, width // 2, 2))
        return torch.view_as_real(pairs * turn).flatten(2)

    for i in range(p["n_layers"]):
        at, ff = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        y = norm(x, f"layers.{i}.attention_norm.weight")
        q, k, v = ((y @ weights[f"{at}.{n}.weight"].T).view(length, -1, width) for n in ("wq", "wk", "wv"))
        times = p["n_heads"] // p["n_kv_heads"]
        q, k, v = rotated(q), rotated(k).repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        scores = torch.einsum("tnh,snh->nts", q, k) / width**0.5
        mixed = torch.einsum("nts,snh->tnh", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
        x = x + mixed.flatten(1) @ weights[f"{at}.wo.weight"].T
        y = norm(x, f"layers.{i}.ffn_norm.weight")
        inner = torch.nn.functional.silu(y @ weights[f"{ff}.w1.weight"].T) * (y @ weights[f"{ff}.w3.weight"].T)
        x = x + inner @ weights[f"{ff}.w2.weight"].T
    return norm(x, "norm.weight") @ weights["output.weight"].T


def test_mistrals_own_layout_by_its_own_rules(own: Path, backbone: Any, ids: Any) -> None:
    params = json.loads((own / "params.json").read_text())
    assert params["sliding_window"] == 5
    found = mistrals_own(load_file(own / "consolidated.safetensors"), torch.tensor(ids[0]), params)
    assert np.abs(found.numpy() - np.asarray(backbone(ids)[0])).max() < 1e-4
    assert sorted(path.name for path in own.iterdir()) == ["consolidated.safetensors", "params.json"]


def test_all_ways_meet(own: Path, ported: Path, huggingface: Path, tmp_path: Path) -> None:
    port(own, tmp_path / "a")
    assert (tmp_path / "a" / "weights.safetensors").read_bytes() == (ported / "weights.safetensors").read_bytes()
    port(tmp_path / "a", tmp_path / "back", "mistral")
    assert contents(tmp_path / "back") == contents(own)
    for source, name in ((own, "b"), (tmp_path / "a", "c")):
        port(source, tmp_path / name, "huggingface")
        again, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / name, huggingface))
        assert again.keys() == first.keys()
        assert all(torch.equal(again[key], first[key]) for key in first)
        assert not (tmp_path / name / "params.json").exists()


def test_new_shards_are_what_transformers_reads(
    own: Path, mistral: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import MistralForCausalLM

    monkeypatch.setattr(module, "SHARD", 20_000)
    folder = port(own, tmp_path / "a", "huggingface")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert len(shards) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in mistral.parameters())
    theirs = MistralForCausalLM.from_pretrained(folder)
    wanted = mistral.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in theirs.state_dict().items())


def test_turning_the_wrong_way_is_told(
    own: Path, backbone: Any, ids: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(layouts, "TURNED", ())
    port(own, tmp_path / "a")
    assert np.abs(np.asarray(load(tmp_path / "a")(ids)) - np.asarray(backbone(ids))).max() > 1e-2


def test_bare_and_old_names(make_mistral: Any, tmp_path: Path, backbone: Any, ids: Any) -> None:
    """Names without `model.`, and the frequencies that old files carry, go there and back too."""
    folder = tmp_path / "a"
    make_mistral().save_pretrained(folder)
    weights = {k.removeprefix("model."): v for k, v in load_file(folder / "model.safetensors").items()}
    weights["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(weights, folder / "model.safetensors")
    port(folder, tmp_path / "b")
    port(tmp_path / "b", tmp_path / "c", "huggingface")
    assert contents(tmp_path / "c") == contents(folder)
    assert np.array_equal(load(tmp_path / "b")(ids), backbone(ids))


def broken(folder: Path, how: str) -> None:
    """Spoil a folder with a model in it."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    if how == "architecture":
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "gpt2"}))
    elif how == "no weights":
        weights.unlink()
    elif how == "nothing":
        config.unlink()
    elif how == "pickle":
        weights.rename(folder / "consolidated.00.pth")
        config.rename(folder / "params.json")
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif how == "no header":
        weights.write_bytes(b"\xff" * 40)
    elif how == "no json":
        config.write_text("{")
    elif how == "list":
        config.write_text("[]")
    else:
        tensors = load_file(weights)
        gate = "model.layers.1.mlp.gate_proj.weight"
        if how == "missing":
            del tensors[gate]
        elif how == "shape":
            tensors[gate] = tensors[gate][1:].clone()
        elif how == "dtype":
            tensors[gate] = tensors[gate].half()
        else:
            tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(2)
        save_file(tensors, weights)


WORDS = {
    "architecture": "model_type 'gpt2': not an architecture read here; known: mistral, llama",
    "no weights": "has config.json and no weights: model.safetensors is missing",
    "nothing": "no model here: it needs config.json and model.safetensors",
    "pickle": "consolidated.00.pth is a pickle, which can run code when it is read",
    "cut": "not a whole safetensors file",
    "no header": "its first 8 bytes are no length of a header",
    "no json": "config.json: could not be read as JSON",
    "list": "config.json: must hold a JSON object, got list",
    "missing": r"lacks the tensors model.layers.1.mlp.gate_proj.weight",
    "shape": r"gate_proj.weight has the shape \[39, 32\], and the model's settings want \[40, 32\]",
    "dtype": "layers.mlp.gate.weight has the dtypes F16, F32 in different layers",
    "bias": "model.layers.0.self_attn.q_proj.bias is no tensor of a Mistral",
}


@pytest.mark.parametrize("how", WORDS)
def test_what_cannot_be_ported_is_said(how: str, huggingface: Path, tmp_path: Path) -> None:
    shutil.copytree(huggingface, tmp_path / "model")
    broken(tmp_path / "model", how)
    with pytest.raises(ModelError, match=WORDS[how]) as caught:
        port(tmp_path / "model", tmp_path / "new")
    assert "model" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_shards_that_are_missing_or_elsewhere(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    (gone := sorted(folder.glob("*.safetensors"))[1]).unlink()
    with pytest.raises(ModelError, match=f"shards {gone.name} is missing"):
        port(folder, tmp_path / "new")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../other.safetensors"}}))
    with pytest.raises(ModelError, match="is not a file of this folder"):
        port(folder, tmp_path / "new")


def test_other_mistakes(huggingface: Path, ported: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is something here already"):
        port(huggingface, ported)
    with pytest.raises(ModelError, match="is in the jax layout already"):
        port(ported, tmp_path / "a")
    with pytest.raises(ModelError, match=r"unknown layout 'hugging'. Did you mean 'huggingface'\?"):
        port(ported, tmp_path / "a", "hugging")
    with pytest.raises(ModelError, match="there is no such folder"):
        port(tmp_path / "none", tmp_path / "a")
    with pytest.raises(ModelError, match=r"no perdure.json here, so it is no ported model; make one: perdure port"):
        load(huggingface)
    with pytest.raises(ModelError, match='kernel "cudnn" needs an NVIDIA GPU'):
        load(ported, kernel="cudnn")
    with pytest.raises(ModelError, match=r"kernel 'flash': must be one of xla, cudnn"):
        load(ported, kernel="flash")
    with pytest.raises(ModelError, match=r"dtype int8: must be one of float32, bfloat16"):
        load(ported, "int8")
    shutil.copytree(ported, tmp_path / "b")
    manifest = tmp_path / "b" / "perdure.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(NewerFormatError):
        load(tmp_path / "b")
    manifest.write_text(json.dumps({**values, "config": {}}))
    with pytest.raises(ModelError, match="not as port writes it"):
        load(tmp_path / "b")
    for part, name in (("texts", "../evil"), ("headers", "a/b.safetensors"), ("beside", "/etc/passwd")):
        given = values["origin"][part]
        added = [*given, name] if isinstance(given, list) else {**given, name: "x"}
        manifest.write_text(json.dumps({**values, "origin": {**values["origin"], part: added}}))
        with pytest.raises(ModelError, match="is no name of a file"):
            port(tmp_path / "b", tmp_path / "out" / "in", "huggingface")
        assert not (tmp_path / "out").exists()


def test_types_are_taken_as_text_or_as_jax_has_them(ported: Path, ids: Any) -> None:
    import jax.numpy as jnp

    text, kind = load(ported, "bfloat16"), load(ported, jnp.bfloat16)
    assert np.array_equal(text(ids), kind(ids))
    with pytest.raises(ModelError, match=r"dtype int32: must be one of float32"):
        load(ported, jnp.int32)


def test_float16_is_computed_in_float32_on_a_processor(make_mistral: Any, tmp_path: Path, ids: Any) -> None:
    make_mistral(torch.float16).save_pretrained(tmp_path / "half")
    port(tmp_path / "half", tmp_path / "ported")
    model = load(tmp_path / "ported")
    assert str(model.embed.dtype) == "float16"
    assert np.array_equal(model(ids), load(tmp_path / "ported", "float32")(ids))


def test_a_tied_model_goes_through_mistrals_layout_and_back(make_mistral: Any, tmp_path: Path, ids: Any) -> None:
    make_mistral(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    port(tmp_path / "tied", tmp_path / "own", "mistral")
    port(tmp_path / "own", tmp_path / "ported")
    port(tmp_path / "tied", tmp_path / "straight")
    assert np.array_equal(load(tmp_path / "ported")(ids), load(tmp_path / "straight")(ids))


@pytest.mark.parametrize("scaled", [{"yarn": {"factor": 4}}, {"use_scaled_rope": True}])
def test_scaled_positions_are_refused_in_either_layout(scaled: dict[str, Any], own: Path, tmp_path: Path) -> None:
    shutil.copytree(own, tmp_path / "own")
    settings = tmp_path / "own" / "params.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **scaled}))
    with pytest.raises(ModelError, match=r"scaled rotary positions \("):
        port(tmp_path / "own", tmp_path / "new")


def test_what_fails_midway_leaves_nothing(huggingface: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full(self: Cut) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Cut, "pieces", full)
    with pytest.raises(PerdureError, match="the disk is full"):
        port(huggingface, tmp_path / "new")
    assert not list(tmp_path.iterdir())


MEASURED = """
import os, sys
from pathlib import Path
os.fsync = lambda file: None
from perdure.jax.port import port
port(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
assert not {"jax", "torch"} & set(sys.modules)
# What getrusage says begins with the memory of the process that started this one.
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_a_port_needs_little_memory(tmp_path: Path) -> None:
    """A model of 295 MB with a tensor of 66 MB takes 110 MB in all, Python and numpy included, and no JAX."""
    from benchmarks.jax_steps import synthetic

    size, largest = synthetic(tmp_path / "a", width=1024, layers=6, shards=3)
    assert (round(size / 1e6), round(largest / 1e6)) == (295, 66)
    for source, dest, to in (("a", "b", "jax"), ("b", "c", "mistral")):
        shown = subprocess.run(
            [sys.executable, "-c", MEASURED, tmp_path / source, tmp_path / dest, to],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert int(shown.stdout) < 110e6
