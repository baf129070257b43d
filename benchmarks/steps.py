"""One optimizer step: a bare PyTorch loop against perdure's naive step, in turn, medians in one run."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from perdure.config import TrainingSettings, validate
from perdure.models.adapters import tune
from perdure.models.load import load
from perdure.strategies import Naive
from perdure.streams.encode import Encoder
from perdure.streams.spec import StreamSpec, build
from perdure.tracking import MetricsLog
from perdure.training import checkpoint
from perdure.training.learner import Learner
from perdure.training.loop import KeyedSource, fit
from perdure.types import Example, Phase, Task

SHARED = Path(__file__).resolve().parents[2] / "shared"
SETTINGS = {"optimizer": {"type": "adamw", "lr": 1e-4, "weight_decay": 0.0}, "clip": 1.0, "batch_size": 16}
WARM_UP = 5


def bare(model: Any, batches: Sequence[Sequence[Example]]) -> Iterator[None]:
    """The loop that one would write by hand for this model and these rows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    model.train()
    for rows in batches:
        ids = pad_sequence([row.x for row in rows if row.x is not None], batch_first=True)
        labels = pad_sequence([row.y for row in rows if row.y is not None], batch_first=True, padding_value=-100)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        yield


def ours(model: Any, source: KeyedSource, epochs: int, folder: Path) -> Iterator[None]:
    """perdure's loop with its log written at every step, as a run does."""
    learner = Learner(model, Naive(), "causal_lm", validate(TrainingSettings, SETTINGS, "bench"), 0)
    learner.begin_task(Task("bench", source.examples), 0)
    log = MetricsLog(folder / "metrics.jsonl")
    for _, result in fit(learner, source, [Phase("train", epochs)]):
        log.write("step", step=learner.steps, loss=result.loss, lr=result.lr, tokens=result.tokens)
        yield
    log.close()


def timed(step: Iterator[None]) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    next(step)
    return time.perf_counter() - start


def compare(name: str, model: Any, rows: Sequence[Example], steps: int) -> None:
    """Print the median step of both loops and the median of their paired ratios."""
    source = KeyedSource(rows, 16, 0, "bench")
    epochs = -(-(WARM_UP + steps) // len(source)) + 1
    batches = [batch for epoch in range(epochs) for batch in source.batches(0, epoch)]
    twin = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        loops = bare(model, batches), ours(twin, source, epochs, Path(folder))
        times: list[tuple[float, float]] = []
        for index in range(WARM_UP + steps):
            # Who goes first alternates, since the second one finds the caches warm.
            first, second = (0, 1) if index % 2 else (1, 0)
            pair = {first: timed(loops[first]), second: timed(loops[second])}
            times.append((pair[0], pair[1]))
    times = times[WARM_UP:]
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    plain, perdure = (statistics.median(column) * 1000 for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(
        f"{name:<18} bare loop {plain:7.2f} ms   perdure {perdure:7.2f} ms   ratio {ratio:.3f}   "
        f"weights after {steps + WARM_UP} steps {'equal' if same else 'DIFFER'}"
    )


def saving(name: str, model: Any, rows: Sequence[Example], tuning: str, every: int = 50) -> None:
    """Print what a checkpoint after every so many steps adds to them, and its size against the model's."""
    model = tune(model, tuning, r=16, alpha=32)  # type: ignore[arg-type]
    learner = Learner(model, Naive(), "causal_lm", validate(TrainingSettings, SETTINGS, "bench"), 0)
    learner.begin_task(Task("bench", rows), 0)
    steps, saves = [], []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # /tmp may be memory
        for number in range(WARM_UP + 25):
            begin = time.perf_counter()
            learner.step(rows[:16])
            middle = time.perf_counter()
            steps.append(middle - begin)
            checkpoint.save(Path(folder) / str(number), {"learner": learner.state_dict()})
            saves.append(time.perf_counter() - middle)
        size = sum(file.stat().st_size for file in (Path(folder) / str(number)).iterdir())
    step, save = statistics.median(steps[WARM_UP:]), statistics.median(saves[WARM_UP:])
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    print(
        f"{name:<18} {tuning}: step {step * 1000:.1f} ms, checkpoint {save * 1000:.1f} ms, every {every} steps "
        f"adds {save / (every * step):.1%}; {size / 1e6:.1f} MB, weights {whole / 1e6:.1f} MB"
    )


def main() -> None:
    """Compare on nano and, where it is at hand, on bitstories-3.3M."""
    print(f"threads {torch.get_num_threads()}, batch 16, both loops in turn, medians")
    cases: list[tuple[str, str, int, Callable[[], dict[str, Any]], Path | None]] = [
        ("nano", "nano", 100, lambda: {"arena": {"train_rows": 100, "evaluation_rows": 0, "kinds": ["math"]}}, None)
    ]
    real = SHARED / "models" / "bitstories-3.3M"
    if real.is_dir():
        from perdure.recipes.find import read_recipe

        cases.append(
            ("bitstories-3.3M", str(real), 20, lambda: read_recipe("math-hotpot")[0]["stream"], SHARED / "data")
        )
    for name, source, steps, stream, data in cases:
        language = load(source)
        encoder = Encoder(language.tokenizer, language.max_length)
        built, _ = build(StreamSpec.model_validate(stream()), data, 0, encoder)
        rows = list(built[0].train)
        compare(name, language.model, rows, steps)
        if name == "nano":
            saving(name, load(source).model, rows, "full")
            saving(name, load(source).model, rows, "lora")


if __name__ == "__main__":
    main()
