"""Commands on reactions and their yields: arguments only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perdure.cli_options import GoesOn, Out, Resume, RunArgument, Seed, Set, Track, again, refuse_before

reactions_app = typer.Typer(
    help="Learn the yields of reactions, one pair of reactants after another.", add_completion=False
)

Table = Annotated[
    Path | None,
    typer.Option("--data", help="Table of reactions: the published spreadsheet, or a CSV.", show_default=False),
]
Backbone = Annotated[
    str | None,
    typer.Option("--model", help="minilm (the default where installed), nano, a model folder, or a hub name."),
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over each task; by default 15.", min=1)]
Rate = Annotated[float | None, typer.Option("--lr", help="Learning rate of AdamW; by default 2e-4.")]
Rows = Annotated[int | None, typer.Option("--batch-size", help="Rows of a step; by default 32.", min=1)]
Precision = Annotated[
    str | None, typer.Option("--precision", help="bf16 (the default; with --backend jax, fp32) or fp32.")
]
Smiles = Annotated[str | None, typer.Option("--smiles-column", help="Column of reaction SMILES; by default found.")]
Yields = Annotated[str | None, typer.Option("--yield-column", help="Column of yields; by default found.")]
Scale = Annotated[
    str | None, typer.Option("--yield-scale", help="percent or fraction; by default by the largest yield.")
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--task-columns",
        help="Columns, with commas between, whose values make a task; by default the reactant pair.",
    ),
]


@reactions_app.callback(invoke_without_command=True)
def reactions(
    context: typer.Context,
    setting: Annotated[
        str,
        typer.Option(
            "--setting", help="joint, sequential, replay, isolated, or any strategy (`perdure list strategies`)."
        ),
    ] = "replay",
    tuning: Annotated[str, typer.Option("--tuning", help="head (the backbone is frozen), lora or full.")] = "head",
    model: Backbone = None,
    data: Table = None,
    epochs: Epochs = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of LoRA; by default 16.", min=1)] = None,
    lora_alpha: Annotated[
        int | None, typer.Option("--lora-alpha", help="Scale of LoRA; by default 64.", min=1)
    ] = None,
    lr: Rate = None,
    heads: Annotated[
        int | None, typer.Option("--heads", help="Attention heads of the regression head; by default 4.", min=1)
    ] = None,
    head: Annotated[
        str | None, typer.Option("--head", help="mhar (the default); mean or linear are baselines.")
    ] = None,
    ensemble: Annotated[
        int | None, typer.Option("--ensemble", help="Heads side by side, whose spread tells doubt.", min=1)
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="What replay keeps: rows, a share as in 10% (the default), or all."),
    ] = None,
    gradient: Annotated[
        str | None,
        typer.Option("--gradient", help="New and replayed rows: combined in one loss, or separate gradients."),
    ] = None,
    batch_size: Rows = None,
    precision: Precision = None,
    smiles: Smiles = None,
    yields: Yields = None,
    scale: Scale = None,
    columns: Columns = None,
    order: Annotated[
        str | None, typer.Option("--order", help="Of the tasks: file (the default), random, sorted, similarity.")
    ] = None,
    holdout: Annotated[
        float | None, typer.Option("--holdout", help="Share of each task's rows held out; by default 0.3.")
    ] = None,
    augment: Annotated[
        int | None,
        typer.Option("--augment", help="Copies of each training row in other SMILES; needs RDKit.", min=0),
    ] = None,
    canonical: Annotated[
        bool, typer.Option("--canonical", help="Write every SMILES in its canonical form; needs RDKit.")
    ] = False,
    backend: Annotated[str, typer.Option("--backend", help="torch, or jax: a Mistral in JAX.")] = "torch",
    seed: Seed = None,
    out: Out = None,
    resume: Resume = False,
    override: Set = None,
    track: Track = None,
) -> None:
    """Train a regression head on a language model, one pair of reactants after another."""
    if context.invoked_subcommand is not None:
        refuse_before(context)
        return
    from perdure.recipes.reactions.command import run_reactions
    from perdure.recipes.reactions.options import Options

    options = Options(
        data=data,
        setting=setting,
        tuning=tuning,
        model=model,
        head=head,
        heads=heads,
        ensemble=ensemble,
        epochs=epochs,
        rank=rank,
        lora_alpha=lora_alpha,
        lr=lr,
        batch_size=batch_size,
        precision=precision,
        memory=memory,
        gradient=gradient,
        smiles_column=smiles,
        yield_column=yields,
        yield_scale=scale,
        task_columns=columns,
        order=order,
        holdout=holdout,
        augment=augment,
        canonical=canonical,
        seed=seed,
        out=out,
    )
    run_reactions(options, override or [], resume, again(), track or [], backend)


@reactions_app.command("sweep")
def sweep(
    rank: Annotated[str, typer.Option("--rank", help="Ranks of LoRA, with commas between.")] = "4,8,16,32",
    model: Backbone = None,
    data: Table = None,
    epochs: Epochs = None,
    lr: Rate = None,
    full_lr: Annotated[
        float | None, typer.Option("--full-lr", help="Learning rate of full tuning; by default a tenth of LoRA's.")
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, with commas between.")] = "7193",
    batch_size: Rows = None,
    precision: Precision = None,
    smiles: Smiles = None,
    yields: Yields = None,
    scale: Scale = None,
    columns: Columns = None,
    out: Out = None,
    override: Set = None,
    resume: GoesOn = False,
) -> None:
    """Joint training with LoRA at several ranks, and in full: from which rank on is LoRA as good?"""
    from perdure.recipes.reactions.options import Options
    from perdure.recipes.reactions.sweep import run_sweep

    options = Options(
        data=data,
        setting="joint",
        tuning="lora",
        model=model,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        precision=precision,
        smiles_column=smiles,
        yield_column=yields,
        yield_scale=scale,
        task_columns=columns,
        out=out,
    )
    run_sweep(options, rank, seeds, full_lr, override or [], again())


def predict(
    run: RunArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Table of reactions; yields in it are compared.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The CSV file to write.")] = Path("predictions.csv"),
    level: Annotated[
        float, typer.Option("--level", help="Share of yields that the intervals are to hold: 0.1, 0.15, … 0.95.")
    ] = 0.9,
) -> None:
    """Foretell the yields of a table of reactions, with intervals."""
    from perdure.recipes.reactions.predict import predict as run_predict

    run_predict(run, file, out, level)
