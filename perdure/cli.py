"""The command line: reads arguments, prints results. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from perdure.allocator import keep_freed_memory
from perdure.cli_arena import arena_app
from perdure.cli_options import Data, GoesOn, Model, Out, Resume, RunArgument, Seed, Set, Track, again
from perdure.cli_reactions import predict, reactions_app
from perdure.errors import PerdureError

app = typer.Typer(
    name="perdure",
    help="Train language models through a stream of tasks, and see what they forgot.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"perdure {installed('perdure')}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the three runs and their report.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of data, order and memory.", min=0, max=(1 << 63) - 1)
    ] = 0,
    override: Set = None,
    track: Track = None,
    resume: GoesOn = False,
) -> None:
    """Five skills in a row on the embedded model: naive, replay and joint, with a report (about two minutes)."""
    from perdure.recipes.demo import run_demo

    run_demo(out, seed, override or [], again(), track or [])


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (see `perdure list recipes`) or a YAML file.")],
    model: Annotated[
        str | None, typer.Option("--model", help="nano, a model folder, or a hub name (owner/name).")
    ] = None,
    data: Data = None,
    tuning: Annotated[
        str | None, typer.Option("--tuning", help="full, lora, soft-prompt; head for reactions.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option("--strategy", help="A strategy, several joined by +, or joint, or isolated.")
    ] = None,
    seed: Seed = None,
    out: Out = None,
    resume: Resume = False,
    override: Set = None,
    track: Track = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the model with torch.compile.")] = False,
    skip_bad_batches: Annotated[
        bool, typer.Option("--skip-bad-batches", help="Leave out steps whose loss or gradient is not finite.")
    ] = False,
) -> None:
    """Train a model through a recipe's stream of tasks and report what it kept."""
    from perdure.recipes.run import run_recipe

    given = {"model": model, "tuning": tuning, "strategy": strategy, "seed": seed}
    if compiled:
        given["compile"] = True
    if skip_bad_batches:
        given["skip_bad_batches"] = True
    if data is not None:
        given["data"] = str(data)
    run_recipe(recipe, given, override or [], out, resume, again(), track or [])


@app.command()
def mix(
    method: Annotated[
        str,
        typer.Option(
            "--selection-method",
            help="none, random, difficulty_hard, difficulty_easy, loss_descending, loss_ascending; all of these; "
            "or any policy (`perdure list policies`). Several with commas between.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="nano, a model folder, or a hub name. By default TinyLlama 1.1B.")
    ] = None,
    task_a: Annotated[
        str | None, typer.Option("--task-a", help="Trained first: hub name, data file, or YAML. By default MATH.")
    ] = None,
    task_b: Annotated[
        str | None, typer.Option("--task-b", help="Trained second, likewise. By default HotpotQA.")
    ] = None,
    share: Annotated[
        float, typer.Option("--mix-percentage", help="Share of the first task's rows, above 0, at most 1.")
    ] = 0.1,
    unit: Annotated[str, typer.Option("--mix-unit", help="What the share is of: examples or tokens.")] = "examples",
    resample: Annotated[bool, typer.Option("--resample", help="Choose the rows anew for each epoch.")] = False,
    n_train: Annotated[int, typer.Option("--n-train", help="Most training rows of each task.", min=1)] = 4000,
    n_val: Annotated[
        int, typer.Option("--n-val", help="Validation rows of each task; at most a fifth of its rows.", min=1)
    ] = 400,
    epochs_a: Annotated[int, typer.Option("--task-a-epochs", help="Passes over the first task.", min=1)] = 2,
    epochs_b: Annotated[int, typer.Option("--task-b-epochs", help="Passes over the second.", min=1)] = 2,
    eval_every: Annotated[int, typer.Option("--eval-every", help="Steps between two measurements.", min=1)] = 30,
    generate_rows: Annotated[
        int,
        typer.Option("--generate-rows", help="Validation rows of each task that answers are generated for.", min=1),
    ] = 100,
    max_length: Annotated[
        int, typer.Option("--max-seq-length", help="Most tokens of a row; the model's limit holds too.", min=8)
    ] = 2048,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows of a step.", min=1)] = 64,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(
            "--micro-batch-size",
            help="Rows that go through the model together; by default 8 without a GPU.",
            min=1,
        ),
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Less memory, a third more arithmetic; by default with a GPU.",
        ),
    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="bf16 or fp32.")] = "bf16",
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of AdamW.")] = 2e-4,
    field: Annotated[str, typer.Option("--difficulty-field", help="Column that says how hard a row is.")] = "level",
    context: Annotated[
        str,
        typer.Option(
            "--context", help="Before HotpotQA's questions: support, full, or auto (full from 2,048 tokens)."
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything.", min=0, max=(1 << 63) - 1)] = 42,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", help="Selections at once; by default one a core for small models, else 1.", min=1
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the experiment.", show_default=False)] = None,
    override: Set = None,
    track: Track = None,
    resume: GoesOn = False,
) -> None:
    """Train on one task, then on another with chosen rows of the first mixed in, and see what is lost."""
    from perdure.recipes.mixing.command import run_mix
    from perdure.recipes.mixing.options import MODEL, TASK_A, TASK_B, Options

    options = Options(
        method,
        model=model or MODEL,
        task_a=task_a or TASK_A,
        task_b=task_b or TASK_B,
        mix=share,
        unit=unit,
        resample=resample,
        n_train=n_train,
        n_val=n_val,
        epochs_a=epochs_a,
        epochs_b=epochs_b,
        eval_every=eval_every,
        generate_rows=generate_rows,
        max_length=max_length,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        lr=lr,
        precision=precision,
        checkpointing=checkpointing,
        field=field,
        context=context,
        seed=seed,
        workers=workers,
        out=out,
    )
    run_mix(options, override or [], again(), track or [])


@app.command()
def teach(
    model: Model = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN", help="Teach the model of a finished run on.")
    ] = None,
    tuning: Annotated[
        str | None, typer.Option("--tuning", help="lora (the default) or soft-prompt; the base is frozen.")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate; by default by model.", min=0)] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance", help="Share of right answers that a lesson may cost; by default 0.02.", min=0, max=1
        ),
    ] = None,
    gate: Annotated[
        bool | None, typer.Option("--gate/--no-gate", help="Whether lessons that do harm are refused.")
    ] = None,
    probe: Annotated[
        Path | None,
        typer.Option("--probe", help="JSONL with prompt and answer: what must not be lost. By default nano's."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the lessons, which go on there.", show_default=False)
    ] = None,
    seed: Seed = None,
    override: Set = None,
) -> None:
    """Ask a model, correct it, and see what each lesson cost."""
    from perdure.recipes.teach.command import teach as talk

    given = {
        "model": model, "run": None if run is None else str(run), "tuning": tuning, "lr": lr, "gate": gate,
        "tolerance": tolerance, "seed": seed,
    }  # fmt: skip
    talk(given, override or (), out, probe)


app.add_typer(arena_app, name="arena")
app.add_typer(reactions_app, name="reactions")
app.command()(predict)


@app.command()
def extend(
    run: RunArgument,
    task: Annotated[
        Path | None,
        typer.Option("--task", help="The new task: a data file, or a YAML file with a task's settings."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The task's name; by default the file's.")] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--evaluation",
            help="Held-out rows; by default a tenth of the task's, of reactions the run's own share.",
        ),
    ] = None,
    resume: Resume = False,
    track: Track = None,
) -> None:
    """Teach a finished run one more task; its score matrix grows by a row and a column."""
    from perdure.recipes.run import extend_run

    extend_run(run, task, name, evaluation, resume, again(), track or [])


@app.command()
def erase(
    run: RunArgument,
    key: Annotated[list[str] | None, typer.Option("--key", help="A row's key. Repeatable.")] = None,
    match: Annotated[
        list[str] | None,
        typer.Option("--match", metavar="FIELD=VALUE", help="All rows with this value. Repeatable."),
    ] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Start over where no early enough checkpoint is left.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Finish an erasure that was stopped.")] = False,
) -> None:
    """Make a finished run forget rows: byte for byte the run on files without them."""
    from perdure.recipes.erase import erase_rows

    erase_rows(run, key or [], match or [], retrain, resume)


@app.command()
def port(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of a Mistral, in any layout.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="A folder that is not there yet.")],
    to: Annotated[
        str, typer.Option("--to", help="Layout of DEST: jax (what perdure.jax loads), huggingface or mistral.")
    ] = "jax",
) -> None:
    """Copy a Mistral to the layout that perdure.jax loads, or back, tensor by tensor."""
    from perdure.recipes.port import port_model

    port_model(source, dest, to)


@app.command()
def audit(
    run: RunArgument,
    key: Annotated[list[str] | None, typer.Option("--key", help="Only when this row was trained on.")] = None,
) -> None:
    """Show what a run was made from, which rows it saw when, and whether its checkpoints are whole."""
    from perdure.recipes.audit import audit_run

    audit_run(run, key or [])


@app.command()
def verify(run: RunArgument) -> None:
    """Train a run's last stage again, aside, and compare the results byte for byte."""
    from perdure.recipes.audit import verify_run

    verify_run(run)


@app.command()
def evaluate(
    run: RunArgument,
    data: Annotated[
        Path | None, typer.Option("--data", help="Rows to score; by default those of the run's tasks.")
    ] = None,
) -> None:
    """Score a run's model as it is now."""
    from perdure.recipes.run import evaluate_run

    evaluate_run(run, data)


@app.command()
def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Argument(help="The text that the model continues.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Most tokens generated.", min=1)] = 64,
    task: Annotated[
        str | None, typer.Option("--task", help="The prompt's task, for strategies with a part for each task.")
    ] = None,
) -> None:
    """Let a run's model answer a prompt, greedily."""
    from perdure.recipes.serve import generate_text

    generate_text(run, prompt, max_new_tokens, task)


@app.command("list")
def list_things(
    what: Annotated[
        str, typer.Argument(help="strategies, memories, recipes, models, tunings, metrics; all by default.")
    ] = "",
) -> None:
    """What there is to choose from, one line each."""
    from perdure.recipes.catalogue import print_catalogue

    print_catalogue(what)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File or folder of the page.")] = None,
) -> None:
    """Build the plots and the page again; several runs stand side by side."""
    from perdure.recipes.show import rebuild

    rebuild(runs, out)


@app.command()
def plot(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Histories of mixing runs; globs too, also quoted ones.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            "--output",
            help="The picture: .png, .pdf or .svg. By default a window, or without a screen a file here.",
        ),
    ] = None,
) -> None:
    """Draw the histories of mixing runs side by side, a panel for each metric."""
    from perdure.recipes.plot import plot

    plot(files, out)


def main() -> NoReturn:
    """Run the command line; exit codes: 0, 1 the run failed, 2 a mistake in what was asked, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an arrow that a terminal cannot show must not end a run
    keep_freed_memory()
    sys.exit(_guarded(app))


def _guarded(command: Callable[..., Any]) -> int:
    try:
        # Typer prints usage errors itself, with exit code 2.
        command(standalone_mode=True)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(bool(done.code))
    except PerdureError as error:
        _complain(str(error), "" if error.exit_code == 130 else "error: ")
        return error.exit_code
    except KeyboardInterrupt:
        _complain("stopped at once; the newest checkpoint is as it was. Go on with --resume", "")
        return 130
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        _complain("out of memory on the device: a smaller micro_batch_size or model would fit", "error: ")
        return 1
    except MemoryError:
        _complain("out of memory: a smaller micro_batch_size or model would fit", "error: ")
        return 1
    except OSError as error:
        _complain(f"{error.filename or ''}: {error.strerror or error}", "error: ")
        return 1
    return 0


def _complain(text: str, kind: str) -> None:
    print(f"{kind}{text}", file=sys.stderr)


if __name__ == "__main__":
    main()
