"""Four artificial languages, one after another, with every strategy side by side.

A sentence has four words: a particle that tells the language, then subject, verb and object in the language's
order. The question is who acts: one of ten nouns. The languages share words, which mean something else in each.
Printed is the accuracy on held-out sentences; languages.png shows it by language. A strategy that answers by task
has two averages: told the language of each sentence, and inferring it. Strategies that need LoRA are given it, on a
network that nobody trained before, and stand beside a naive one with the same.

Settings were chosen on seed 1; the languages here are those of seed 0.
"""

import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from perdure import ContinualTrainer
from perdure.errors import StrategyError
from perdure.strategies import STRATEGIES, Strategy, build
from perdure.streams.languages import Languages

SETTINGS = {
    "replay": {"capacity": 100},
    "derpp": {"capacity": 100},
    "ewc": {"strength": 3e5},
    "si": {"strength": 20.0},
    "mas": {"strength": 0.05},
    "lwf": {"strength": 0.5, "temperature": 4.0},
    "gem": {"margin": 0.5},
    "agem": {"per_task": 128, "sample": 128},
    "ties": {"start": "last", "density": 0.5},
    "ema": {"decay": 0.4},
}
WITH_LORA = ("olora", "slao")
EPOCHS = 10


class Reader(nn.Module):
    """Words [B, 4] to logits [B, nouns]: embeddings side by side, and two layers."""

    def __init__(self, vocabulary: int, nouns: int, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 16)
        self.blocks = nn.ModuleList([nn.Linear(4 * 16, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, nouns)

    def forward(self, words: Tensor) -> Tensor:
        """One logit for each noun that could be the subject."""
        hidden = self.embed(words).flatten(1)
        for block in self.blocks:
            hidden = block(hidden).relu()
        return self.head(hidden)


def trainer_for(family: Languages, strategy: Strategy, lora: bool) -> ContinualTrainer:
    """A new network, the same for all, under a strategy."""
    torch.manual_seed(0)
    model: nn.Module = Reader(family.vocabulary, family.nouns)
    if lora:
        layers = ["blocks.0", "blocks.1", "head"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=layers))
    optimizer = {"type": "adam", "lr": 0.01 if lora else 0.003}
    return ContinualTrainer(model, strategy, {"optimizer": optimizer, "batch_size": 20})


def main() -> None:
    """Train with every strategy; print a line and keep a row of the figure for each."""
    torch.set_num_threads(1)
    family = Languages(count=4, words=30, seed=0)
    stream = family.stream(train_rows=200, evaluation_rows=100)
    runs = [(name, name) for name in STRATEGIES]
    runs.insert(list(STRATEGIES).index("olora"), ("naive + LoRA", "naive"))
    shown, refused = {}, []
    print(f"chance {1 / family.nouns:.1f}      average  inferred   learnt  forgetting   first language  seconds")
    for label, name in runs:
        begin = time.perf_counter()
        try:
            trainer = trainer_for(family, build(name, SETTINGS), lora="LoRA" in label or name in WITH_LORA)
        except StrategyError as error:
            refused.append(error)
            continue
        for task_id, task in enumerate(stream):
            trainer.train_task(task.train, task.evaluation, task_id, task.name, num_epochs=EPOCHS)
        R, found = trainer.scores.values, trainer.scores.summary()
        inferred = trainer.matrices.get("accuracy_inferred")
        alone = "" if inferred is None else f"{inferred.summary()['average']:.2f}"
        print(
            f"{label:14}{found['average']:8.2f}{alone:>10}{found['learning']:9.2f}{found['forgetting']:12.2f}"
            f"{R[1, 0]:10.2f} → {R[-1, 0]:.2f}{time.perf_counter() - begin:9.1f}"
        )
        shown[label] = R[-1]
    trainer = trainer_for(family, build("naive"), lora=False)
    trainer.train_task(stream.joint()[0].train, num_epochs=EPOCHS)
    shown["all at once"] = [trainer.evaluate(task.evaluation)["accuracy"] for task in stream]
    print(f"{'all at once':14}{sum(shown['all at once']) / len(stream):8.2f}")
    for error in refused:
        print(f"refused: {error}")
    draw(shown, stream.names)


def draw(shown: dict, names: tuple[str, ...]) -> None:
    """The last row of R of each strategy, as languages.png."""
    figure, axes = plt.subplots(figsize=(5, 0.32 * len(shown) + 1), layout="constrained")
    rows = [list(row) for row in shown.values()]
    axes.imshow(rows, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, row in enumerate(rows):
        for x, score in enumerate(row):
            axes.text(x, y, f"{score:.2f}", ha="center", va="center", color="white" if score > 0.6 else "black")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(shown)), shown)
    axes.set_title("Accuracy on each language after the last")
    figure.savefig("languages.png", dpi=120)


if __name__ == "__main__":
    main()
