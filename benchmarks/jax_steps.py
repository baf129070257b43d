"""JAX against torch: the median optimizer step on the same small Mistral, in turn; and the memory of a port."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perdure.jax.config import MistralConfig
from perdure.jax.layouts import keys, name_in, shapes
from perdure.jax.tensors import begin, header_text

SHAPE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "sliding_window": 64,
}  # fmt: skip
BATCH, LENGTH, RANK, ALPHA, LR = 16, 96, 16, 64, 2e-4
WARM_UP = 3


def synthetic(folder: Path, width: int, layers: int, shards: int) -> tuple[int, int]:
    """A sharded bfloat16 Mistral of zeros in sparse files; its bytes, and those of its largest tensor."""
    config = MistralConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=width * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=width // 128, num_key_value_heads=max(1, width // 512), head_dim=128,
        sliding_window=4096,
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_huggingface("bfloat16")))
    wanted = shapes(config)
    entries = [(name_in("huggingface", key), "BF16", wanted[key[0]]) for key in keys(config)]
    places, total, largest = {}, 0, 0
    for number in range(shards):
        part = entries[number * len(entries) // shards : (number + 1) * len(entries) // shards]
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        text = header_text(part, {"format": "pt"})
        sizes = [2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for _, _, shape in part]
        with (folder / name).open("wb") as file:
            begin(file, text)
            file.truncate(file.tell() + sum(sizes))
        places.update({entry[0]: name for entry in part})
        total, largest = total + sum(sizes), max(largest, *sizes)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total, largest


def memory() -> None:
    """Print the peak memory of porting a synthetic sharded model of 2 GB, each way, against the bound."""
    program = (
        "import sys; from pathlib import Path; from perdure.jax.port import port; "
        "port(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]); "
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:  # /tmp may be memory
        folder = Path(place)
        size, largest = synthetic(folder / "huggingface", width=3072, layers=8, shards=4)
        bound = 1.3 * largest + 500e6
        for source, dest, to in (
            ("huggingface", "jax", "jax"),
            ("jax", "own", "mistral"),
            ("jax", "back", "huggingface"),
        ):
            start = time.perf_counter()
            given = [sys.executable, "-c", program, folder / source, folder / dest, to]
            shown = subprocess.run(given, capture_output=True, text=True, check=True).stdout
            print(
                f"port {source} to {to}: {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, peak "
                f"{int(shown) * 1024 / 1e6:.0f} MB (bound {bound / 1e6:.0f}), {time.perf_counter() - start:.1f} s"
            )


def rows_of(count: int) -> tuple[list[list[int]], list[float]]:
    """Rows of 60 to 96 tokens and their targets, the same at every run."""
    import numpy as np

    rng = np.random.default_rng(0)
    ids = [rng.integers(3, SHAPE["vocab_size"], int(rng.integers(60, LENGTH + 1))).tolist() for _ in range(count)]
    return ids, rng.uniform(size=count).tolist()


def torch_side(folder: Path, tuning: str) -> tuple[Callable[[list[list[int]], list[float]], float], Any]:
    """A step by hand with transformers, PEFT and the torch head; the model is saved to the folder first."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import MistralConfig as Config
    from transformers import MistralForCausalLM

    from perdure.models.heads import MHAR

    torch.manual_seed(0)
    model = MistralForCausalLM(Config(**SHAPE, max_position_embeddings=512))
    model.save_pretrained(folder)
    body: Any = model.model
    if tuning == "lora":
        body = get_peft_model(body, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    elif tuning == "head":
        body.requires_grad_(False)
    head = MHAR(SHAPE["hidden_size"])
    weights = {name: value.numpy().copy() for name, value in head.state_dict().items()}
    trained = [p for p in [*body.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    body.train()
    head.train()

    def step(rows: list[list[int]], targets: list[float]) -> float:
        mask = torch.arange(LENGTH) < torch.tensor([len(row) for row in rows])[:, None]
        ids = torch.tensor([[*row, *[0] * (LENGTH - len(row))] for row in rows])
        # Padded on the right under a causal mask: without a mask of its own the backbone takes its fastest way.
        states = body(input_ids=ids, use_cache=False).last_hidden_state
        loss = (0.5 * (head(states, mask) - torch.tensor(targets)) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, weights


def jax_side(folder: Path, tuning: str, head: Any) -> tuple[Callable[[list[list[int]], list[float]], float], Any]:
    """The learner's step on the port of that model."""
    import jax

    from perdure.jax import FitSettings, Learner, Regressor, Row, add_lora, load
    from perdure.jax.heads import from_torch_names
    from perdure.jax.port import port

    backbone = load(port(folder, folder.with_name("ported")))
    if tuning == "lora":
        backbone = add_lora(backbone, jax.random.key(0), RANK, ALPHA)
    settings = FitSettings(tuning=tuning, batch_size=BATCH, length=LENGTH, lr=LR)  # type: ignore[arg-type]
    learner = Learner(Regressor(backbone, from_torch_names(head)), settings)

    def step(rows: list[list[int]], targets: list[float]) -> float:
        new = [Row(str(i), tuple(ids), y) for i, (ids, y) in enumerate(zip(rows, targets, strict=True))]
        return learner.step(new).loss

    return step, learner


def compare(tuning: str, steps: int) -> None:
    """Print the median step of both and the median of their paired ratios."""
    ids, targets = rows_of(BATCH * 4)
    with tempfile.TemporaryDirectory() as place:
        by_hand, head = torch_side(Path(place) / "model", tuning)
        ours, learner = jax_side(Path(place) / "model", tuning, head)
        times: list[tuple[float, float]] = []
        for number in range(WARM_UP + steps):
            start = number * BATCH % len(ids)
            part = ids[start : start + BATCH], targets[start : start + BATCH]
            pair = {}
            # Who goes first alternates, since the second one finds the caches warm.
            for side in (0, 1) if number % 2 else (1, 0):
                begun = time.perf_counter()
                (by_hand, ours)[side](*part)
                pair[side] = time.perf_counter() - begun
            times.append((pair[0], pair[1]))
    first, times = times[0], times[WARM_UP:]
    torch_ms, jax_ms = (statistics.median(column) * 1000 for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(
        f"{tuning:<5} torch {torch_ms:7.1f} ms   jax {jax_ms:7.1f} ms   ratio {ratio:.2f}   first step "
        f"{first[0]:.1f} s and {first[1]:.1f} s   compiled {learner.compilations['step']} time(s)"
    )


def main() -> None:
    """Compare steps, or measure the memory of a port."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--memory", action="store_true", help="measure the memory of a port instead")
    given = parser.parse_args()
    if given.memory:
        memory()
        return
    import torch

    print(", ".join(f"{value} {name}" for name, value in SHAPE.items()))
    print(f"batch {BATCH} x {LENGTH}, threads {torch.get_num_threads()}, both in turn, medians of {given.steps}")
    for tuning in ("lora", "full", "head"):
        compare(tuning, given.steps)


if __name__ == "__main__":
    main()
