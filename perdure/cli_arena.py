"""Commands of the reasoning arena: arguments only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perdure.cli_options import Model, Out, Resume, Seed, Set, Track, again, refuse_before
from perdure.errors import ConfigError

arena_app = typer.Typer(
    help="Learn online in the reasoning arena: one problem at a time, examined on others.", add_completion=False
)


@arena_app.callback(invoke_without_command=True)
def arena(
    context: typer.Context,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="lora, soft-prompt, full, multi-lora (an adapter for each kind), reptile or maml. "
            "By default lora (of TinyLlama, soft-prompt).",
        ),
    ] = None,
    model: Model = None,
    episodes: Annotated[
        int | None, typer.Option("--episodes", help="Problems to learn from; by default 80.", min=1)
    ] = None,
    eval_tasks: Annotated[
        int | None,
        typer.Option("--eval-tasks", help="Held-out problems; by default 500 for nano, else 30.", min=1),
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option("--eval-every", help="Episodes between two examinations; by default 10.", min=1)
    ] = None,
    lora_r: Annotated[int | None, typer.Option("--lora-r", help="Rank of LoRA; by default 16.", min=1)] = None,
    lora_alpha: Annotated[
        int | None, typer.Option("--lora-alpha", help="Scale of LoRA; by default 32.", min=1)
    ] = None,
    soft_tokens: Annotated[
        int | None, typer.Option("--soft-tokens", help="Tokens of the soft prompt; by default 8.", min=1)
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Learning rate of AdamW; the default depends on model and method.")
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Mixed precision in fp16.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision in bf16.")] = False,
    kinds: Annotated[
        str | None, typer.Option("--kinds", help="Kinds of problems, commas between (`arena tasks` shows all).")
    ] = None,
    levels: Annotated[
        str | None, typer.Option("--levels", help="Difficulty, as in 1-5 or 2,4; by default 1-3.")
    ] = None,
    forms: Annotated[
        int | None, typer.Option("--forms", help="Wordings of the prompts of a kind; by default 3.", min=1, max=12)
    ] = None,
    strategy: Annotated[
        str | None, typer.Option("--strategy", help="A method against forgetting, several joined by +.")
    ] = None,
    replay: Annotated[
        str | None,
        typer.Option("--replay", help="Replay earlier problems: reservoir, ring, balanced, or a selection policy."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="What replay keeps: rows, or a size as in 2MB; by default 200.")
    ] = None,
    curriculum: Annotated[
        str | None, typer.Option("--curriculum", help="off, easy-first, or competence (harder when it is ready).")
    ] = None,
    drift: Annotated[
        str | None, typer.Option("--drift", help="off, blocks (one kind after another), or gradual.")
    ] = None,
    learn_on: Annotated[
        str | None, typer.Option("--learn-on", help="all, or errors: only where the answer was wrong.")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Of the newest problems, so many make a step.", min=1)
    ] = None,
    passes: Annotated[int | None, typer.Option("--passes", help="Steps an episode; by default 1.", min=1)] = None,
    task_every: Annotated[
        int | None,
        typer.Option("--task-every", help="Episodes of a task, for strategies that need an end.", min=1),
    ] = None,
    seed: Seed = None,
    out: Out = None,
    resume: Resume = False,
    override: Set = None,
    track: Track = None,
) -> None:
    """Learn from one problem at a time, and be examined on problems that are never learnt from."""
    if context.invoked_subcommand is not None:
        refuse_before(context)
        return
    from perdure.recipes.arena.command import run_arena
    from perdure.recipes.arena.options import Options

    if fp16 and bf16:
        raise ConfigError("--fp16 and --bf16: choose one")
    options = Options(
        method=method,
        model=model,
        episodes=episodes,
        eval_tasks=eval_tasks,
        eval_every=eval_every,
        lora_r=lora_r,
        lora_alpha=lora_alpha,
        soft_tokens=soft_tokens,
        lr=lr,
        precision="fp16" if fp16 else "bf16" if bf16 else None,
        seed=seed,
        kinds=kinds,
        levels=levels,
        forms=forms,
        strategy=strategy,
        replay=replay,
        memory=memory,
        curriculum=curriculum,
        drift=drift,
        learn_on=learn_on,
        window=window,
        passes=passes,
        task_every=task_every,
        out=out,
    )
    run_arena(options, override or [], resume, again(), track or [])


@arena_app.command("tasks")
def arena_tasks(
    count: Annotated[int, typer.Option("-n", help="Problems of each kind.", min=1)] = 5,
    kind: Annotated[str | None, typer.Option("--kind", help="One kind; by default all.")] = None,
    level: Annotated[int | None, typer.Option("--level", help="One level; by default 1 to 3.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Other problems.", min=0, max=(1 << 63) - 1)] = 0,
) -> None:
    """Print examples of the arena's problems."""
    from perdure.recipes.arena.tasks import print_tasks

    print_tasks(kind, level, count, seed)


@arena_app.command("compare")
def arena_compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of arena runs, or folders that hold several.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the pictures and the summary.")] = None,
) -> None:
    """Compare arena runs: two pictures and RESULTS_SUMMARY.md."""
    from perdure.recipes.arena.compare import compare

    compare(runs, out)
