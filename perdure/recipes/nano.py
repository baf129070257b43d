"""Make nano from nothing: generated text, a byte-level BPE tokenizer, a small Llama, its probe score.

python -m perdure.recipes.nano --out DIR [--seed 0] [--device cpu|cuda] [--tokens N] [--threads N]
"""

import argparse
import hashlib
import json
import math
import random
import time
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from perdure.streams import arena, corpus

VOCABULARY = 1024
CONTEXT = 512
SPECIAL = ("<s>", "</s>", "<pad>")
BATCH_TOKENS = 512
STEP_BATCHES = 4  # of rows of like length each: one batch holds few kinds, a step should hold many
TOKENS = 30_000_000
PEAK_LR = 3e-3
WARM_UP = 0.02

Row = tuple[list[int], list[float]]  # token ids and the loss weight of each


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: digits stay single, `<s>` goes in front, nothing goes behind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of about a million parameters with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.04,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Text:
    """The pre-training text as batches; remembers how many tokens it gave and a hash of what it gave."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, documents: Iterator[corpus.Document], seed: int) -> None:
        self.documents = documents
        self.backend = tokenizer.backend_tokenizer
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.hash = hashlib.blake2b(digest_size=16)
        self.rng = random.Random(f"batches/{seed}")

    def rows(self, count: int) -> list[Row]:
        """The next documents as `<s>` + text + `</s>`."""
        documents = list(islice(self.documents, count))
        for document in documents:
            self.hash.update(corpus.text_of(document).encode() + b"\n")
        pieces = [text for document in documents for text, _ in document]
        encoded = iter(self.backend.encode_batch_fast(pieces, add_special_tokens=False))
        rows = []
        for document in documents:
            ids, weights = [self.bos], [0.0]
            for _, weight in document:
                piece = next(encoded).ids
                ids += piece
                weights += [weight] * len(piece)
            rows.append(([*ids, self.eos][:CONTEXT], [*weights, 1.0][:CONTEXT]))
        return rows

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Right-padded ids and weights, `[B, T]` both, rows of like length together, without end."""
        while True:
            rows = sorted(self.rows(16_384), key=lambda row: len(row[0]))
            cuts, start = [], 0
            for end in range(1, len(rows) + 1):
                if end == len(rows) or len(rows[end][0]) * (end + 1 - start) > BATCH_TOKENS:
                    cuts.append((start, end))
                    start = end
            self.rng.shuffle(cuts)
            for start, end in cuts:
                width = len(rows[end - 1][0])
                ids = torch.tensor([r[0] + [self.pad] * (width - len(r[0])) for r in rows[start:end]])
                weights = torch.tensor([r[1] + [0.0] * (width - len(r[1])) for r in rows[start:end]])
                yield ids, weights


def weighted_loss(model: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean next-token cross-entropy under the weights; causality makes a mask for right padding needless."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # [B, T-1, V]
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def training_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    """An unbiased estimate of the weighted loss at half its cost: a token counts with its weight as probability.

    What is not drawn needs no logits, and the logits are the dearest part of a model this small.
    """
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # [B, T-1, H]
    drawn = (torch.rand(weights[:, 1:].shape, generator=generator) < weights[:, 1:]).flatten().nonzero()[:, 0]
    drawn = drawn.to(ids.device)
    logits = model.lm_head(hidden.flatten(0, 1).index_select(0, drawn))  # [drawn, V]
    return nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten().index_select(0, drawn))


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms; both under one learning rate."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.01, ns_steps=4, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=PEAK_LR, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def pretrain(model: LlamaForCausalLM, text: Text, device: str, tokens: int, seed: int) -> dict[str, float | int]:
    """One pass over fresh text until the tokens are used up; the learning rate falls to near 0."""
    optimizers = build_optimizers(model)
    generator = torch.Generator().manual_seed(seed)
    state = {"steps": 0, "tokens": 0, "seconds": 0.0, "loss": math.nan}
    recent: deque[float] = deque(maxlen=100)
    began = time.perf_counter()
    columns = (
        TextColumn("nano"),
        BarColumn(),
        TextColumn("{task.percentage:5.1f}%"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    model.train()
    with Progress(*columns, speed_estimate_period=120) as progress:
        bar = progress.add_task("nano", total=1.0, note="")
        batches = text.batches()
        while True:
            state["seconds"] = time.perf_counter() - began
            done = state["tokens"] / tokens
            if done >= 1:
                break
            rate = PEAK_LR * (done / WARM_UP if done < WARM_UP else 0.5 * (1.01 + 0.99 * math.cos(math.pi * done)))
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate
            total = torch.zeros((), device=device)
            for ids, weights in islice(batches, STEP_BATCHES):
                loss = training_loss(model, ids.to(device), weights, generator) / STEP_BATCHES
                loss.backward()
                total += loss.detach()
                state["tokens"] += int((weights > 0).sum())
            if not torch.isfinite(total):
                raise FloatingPointError(f"the loss is {total.item()} at step {state['steps']}; nothing was saved")
            recent.append(total.item())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            state["steps"] += 1
            if state["steps"] % 50 == 0:
                state["loss"] = round(sum(recent) / len(recent), 4)
                speed = state["tokens"] / state["seconds"]
                progress.update(
                    bar,
                    completed=done,
                    note=f"step {state['steps']} loss {state['loss']:.3f} {speed:,.0f} tokens/s",
                )
                if not progress.console.is_terminal and state["steps"] % 500 == 0:
                    progress.console.print(
                        f"{done:.0%} step {state['steps']} loss {state['loss']} {speed:,.0f} tokens/s"
                    )
    model.eval()
    return state


def greedy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], limit: int = 24
) -> list[str]:
    """The most likely continuation of each prompt up to `</s>`; prompts of one length go together, unpadded."""
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    answers = [""] * len(prompts)
    untyped: Any = model
    for length in sorted({len(ids) for ids in encoded}):
        chosen = [i for i, ids in enumerate(encoded) if len(ids) == length]
        batch = torch.tensor([encoded[i] for i in chosen], device=model.device)
        with torch.inference_mode():
            out = untyped.generate(
                input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=limit, do_sample=False
            )
        for i, ids in zip(chosen, out[:, length:].tolist(), strict=True):
            answers[i] = str(tokenizer.decode(ids, skip_special_tokens=True))
    return answers


def score(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]
) -> dict[str, float]:
    """Share of exact matches under greedy generation, for each skill, and their mean as "all"."""
    answers = greedy(model, tokenizer, [row["prompt"] for row in rows])
    return _by_skill(rows, [float(a == row["answer"]) for a, row in zip(answers, rows, strict=True)])


def held_out_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]
) -> dict[str, float]:
    """Mean cross-entropy of an answer token and `</s>`, in nats, for each skill, and their mean as "all"."""
    losses = []
    with torch.inference_mode():
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = (
                prompt + tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            )
            weights = [0.0] * len(prompt) + [1.0] * (len(ids) - len(prompt))
            device = model.device
            losses.append(
                weighted_loss(
                    model, torch.tensor([ids], device=device), torch.tensor([weights], device=device)
                ).item()
            )
    return _by_skill(rows, losses)


def _by_skill(rows: list[dict[str, str]], values: list[float]) -> dict[str, float]:
    table: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        table.setdefault(row["skill"], []).append(value)
    means = {skill: sum(v) / len(v) for skill, v in table.items()}
    return {skill: round(v, 4) for skill, v in {**means, "all": sum(values) / len(values)}.items()}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Weights as fp16 safetensors; the config says float32, which is what they are to be loaded and trained as."""
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_apart(probe: list[dict[str, str]], seed: int, documents: int = 250_000, items: int = 500) -> None:
    """Assert that corpus, probe and arena share no normalised text (partition makes it so; this looks)."""
    held = {
        normal
        for row in probe
        for normal in (arena.normalise(row["prompt"]), arena.normalise(row["prompt"] + row["answer"]))
    }
    for kind in arena.KINDS:
        for item in arena.generate(kind, items, seed):
            prompt, answer = arena.plain(item)
            asked = item.prompt.removesuffix(arena.ASK)
            held |= {arena.normalise(t) for t in (asked, asked + item.answer, prompt, prompt + answer)}
    for document in islice(corpus.lessons(seed), documents):
        texts = {arena.normalise(corpus.text_of(document)), arena.normalise(document[0][0])}
        assert not texts & held, f"held-out text in the corpus: {corpus.text_of(document)}"


def make(out: Path, seed: int, device: str, tokens: int) -> dict[str, Any]:
    """Train the tokenizer and the model, measure them, and write everything to `out`."""
    probe = corpus.probe()
    check_apart(probe, seed)
    tokenizer = train_tokenizer(
        chain((corpus.text_of(d) for d in islice(corpus.documents(seed), 30_000)), [corpus.vocabulary_text()] * 300)
    )
    model = build_model(tokenizer, seed)
    nn.Module.to(model, device)
    text = Text(tokenizer, corpus.lessons(seed), seed)
    state = pretrain(model, text, device, tokens, seed)
    out.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, out)
    kept = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    nn.Module.to(kept, device)
    report = {
        "seed": seed,
        "parameters": sum(p.numel() for p in kept.parameters()),
        "vocabulary": len(tokenizer),
        **state,
        "seconds": round(state["seconds"], 1),
        "device": device,
        "threads": torch.get_num_threads(),
        "corpus_hash": text.hash.hexdigest(),
        "held_out_loss": held_out_loss(kept, tokenizer, corpus.validation(500)),
        "probe": score(kept, tokenizer, probe),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (out / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in probe))
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make nano: tokenizer, weights, probe set and the record of it.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"length of training, {TOKENS:,} by default")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    report = make(given.out, given.seed, given.device, given.tokens)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
