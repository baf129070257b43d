"""`perdure reactions --backend jax`: a Mistral in JAX through the same stream, into the same run folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from perdure.callbacks import Callback
from perdure.errors import ConfigError, ModelError, RunError
from perdure.jax.config import MistralConfig, read_object
from perdure.jax.source import MANIFEST, open_source
from perdure.models.hidden import cache_folder
from perdure.models.load import LanguageModel, identify, loading
from perdure.recipes.reactions.jax_settings import OWN, check, fit_settings, targets
from perdure.recipes.reactions.outputs import write_outputs
from perdure.recipes.run import quieten
from perdure.recipes.show import write_pages
from perdure.recipes.track import end, stopped
from perdure.storage import file_hash, write_json
from perdure.streams.reactions.encode import ReactionEncoder
from perdure.tracking import build
from perdure.training.display import Display
from perdure.training.folder import LOCK, RunFolder
from perdure.training.plan import Plan, check_strategy, with_capacity
from perdure.training.regression import ReactionData, RegressionMeasure, pin_similarity
from perdure.training.run import Run
from perdure.training.settings import RunSettings
from perdure.types import Task

if TYPE_CHECKING:
    from perdure.recipes.reactions.jax_learner import Weights

Say = Callable[[str], None]
BACKEND = "jax"
# Among what a run's model is made of: without it torch would take such a run up, and leave it half its own.
STATE = "state of the jax backend"
POSITIONS = 2048  # tokens of a row, where the model's folder does not say


def make_plan(settings: RunSettings, folder: Path | None = None, say: Say = lambda text: None) -> Plan:
    """Build everything that the settings name; cheap checks come first.

    Args:
        settings: of the run.
        folder: where relative data paths are looked up.
        say: told where the model is ported to, if it is.

    Raises:
        UsageError: any mistake in what was asked, or JAX is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    check_strategy(settings, "naive" if settings.strategy == "joint" else settings.strategy)
    if settings.strategy not in OWN:
        raise ConfigError(f"strategy {settings.strategy}: the jax backend has {', '.join(OWN)}")
    if settings.strategy == "joint" and settings.extensions:
        raise ConfigError("a joint run cannot be extended: it has no order of tasks; start a new run")
    check(settings)
    settings = pin_similarity(settings)
    source = Path(settings.model)
    if not source.is_dir():
        raise ModelError(f"{source}: the folder of the run's model is not there; put it back")
    config = open_source(source).config
    language = _language(settings.model, source)
    from perdure.jax import MHAR

    _check_heads(MHAR, config, settings)
    limit = min(settings.max_length or language.max_length, language.max_length)
    data = ReactionData(settings, ReactionEncoder(language.tokenizer, limit), folder)
    stream = data.stream()
    mode = "joint" if settings.strategy == "joint" else "sequential"
    stages = tuple(stream.joint() if mode == "joint" else stream)
    _check_ids(stream, config, source)
    base = identify(language) | {f.name: file_hash(f) for f in source.glob("params.json")}
    later = {task.name for task in settings.extensions}
    rows = sum(len(task.train) for task in stream if task.name not in later)
    strategy = with_capacity(settings.continual_strategy, rows)
    longest = max(len(row.x) for task in stream for row in (*task.train, *task.evaluation) if row.x is not None)
    ported = _ported(source, base, say)
    model = _model(ported, settings, strategy, longest)
    from perdure.recipes.reactions.jax_learner import JaxStrategy

    own, replays = model.fit.settings, settings.strategy == "replay"
    kept = min(own.memory or 0, sum(len(task.train) for task in stream)) if replays else 0
    # Of another length of its batches a run ends in other bits.
    stand_in = JaxStrategy(kept, {"length": own.length, "capacity": own.memory if replays else None})
    return Plan(
        settings, language, model, None, stream, stages, mode,
        stand_in, (),
        {"tasks": data.facts, "notes": data.notes, "scale": data.scale}, {**base, STATE: BACKEND}, folder,
        "regression",
    )  # fmt: skip


class JaxRun(Run):
    """A run whose steps JAX takes.

    Args:
        plan: of `make_plan` here.
        folder: as of a run.
        display: the same.
        again: the same.
        commands: the same.
        callbacks: the same.
    """

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        display: Display | None = None,
        again: str = "",
        commands: Sequence[str] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        from perdure.recipes.reactions.jax_learner import JaxLearner, JaxStrategy

        super().__init__(plan, folder, display, again, commands, callbacks)
        self.learner = JaxLearner(plan.model, cast(JaxStrategy, plan.strategy), plan.settings)
        self.measure = RegressionMeasure(self.learner)

    def remember(self) -> None:
        """Work out the hidden states of all rows once, where the backbone is frozen."""
        tasks = (*self.plan.stages, *self.plan.stream.evaluations)
        rows = [row.x for task in tasks for row in (*task.train, *task.evaluation) if row.x is not None]
        with self.display.counting("hidden states") as tell:
            new = self.plan.model.remember(rows, tell)
        if new:
            self.display.say(f"hidden states of {new:,} rows worked out, held in memory")

    def _recorded(self) -> dict[str, Any]:
        return {**super()._recorded(), "backend": BACKEND, "backend_versions": versions()}

    def _finish(self) -> dict[str, Any]:
        results = {**super()._finish(), "backend": BACKEND}
        results["versions"] = {**results["versions"], **versions()}
        write_json(self.folder.results, results)
        return results


def execute(settings: RunSettings, folder: RunFolder, display: Display, again: str, track: Sequence[str]) -> None:
    """Plan, run, and write predictions, plots and page; see `perdure.recipes.run.execute`."""
    quieten()
    path = folder.path
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; give a folder with --out")
    if path.is_dir() and not folder.exists and any(p.name != LOCK for p in path.iterdir()):
        raise RunError(f"{path} is not empty and holds no run; give another folder with --out")
    trackers = build(track, path, display.say)
    with folder.locked():
        plan = make_plan(settings, None, display.say)
        with stopped(trackers):
            run = JaxRun(plan, folder, display, again, callbacks=trackers)
            results = run.execute()
            if results is not None:
                from perdure.recipes.reactions.jax_learner import foretell

                write_outputs(run, foretell)
                write_pages([path])
                end(trackers, results, folder)


def versions() -> dict[str, str]:
    """Of what a result in JAX depends on beside the rest."""
    from importlib.metadata import version

    return {library: version(library) for library in ("jax", "jaxlib", "equinox", "optax")}


def _language(name: str, source: Path) -> LanguageModel:
    """The folder's tokenizer, and how long a row may be; the model itself is JAX's."""
    if not any(source.glob("tokenizer*")):
        raise ModelError(
            f"{source}: no tokenizer here, which reaction SMILES need; put the model's tokenizer.json and "
            "tokenizer_config.json beside its weights"
        )
    from transformers import AutoTokenizer

    with loading(name, str(source)) as options:
        tokenizer = AutoTokenizer.from_pretrained(str(source), **options)
    positions = POSITIONS
    if (source / "config.json").is_file():
        positions = read_object(source / "config.json").get("max_position_embeddings") or POSITIONS
    return LanguageModel(name, str(source), cast(Any, None), tokenizer, int(positions))


def _check_heads(head: Any, config: MistralConfig, settings: RunSettings) -> None:
    """Refuse a head that does not fit the model before any weight is read."""
    import equinox as eqx
    import jax

    eqx.filter_eval_shape(lambda key: head(config.hidden_size, key, settings.head.heads), jax.random.key(0))


def _check_ids(stream: Sequence[Task] | Any, config: MistralConfig, source: Path) -> None:
    """JAX would read another token's embedding in place of one that is not there."""
    most = max(int(row.x.max()) for task in stream for row in (*task.train, *task.evaluation) if row.x is not None)
    if most >= config.vocab_size:
        raise ModelError(
            f"{source}: its tokenizer gives the token {most}, and the model has {config.vocab_size}; they are not "
            "of one model"
        )


def _ported(source: Path, base: Mapping[str, str], say: Say) -> Path:
    """The folder that JAX loads: the source, or its port in the cache, which is written if it is not there yet."""
    if (source / MANIFEST).is_file():
        return source
    name = sha256(json.dumps(dict(sorted(base.items()))).encode()).hexdigest()[:24]
    place = cache_folder().with_name("ported") / name
    if (place / MANIFEST).is_file():
        return place
    from perdure.jax.port import port

    say(f"porting {source} to {place}; `perdure port {source} FOLDER` would do so once for all")
    aside = place.with_name(f"{name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    port(source, aside)
    try:
        aside.rename(place)
    except OSError:  # another run was there first
        shutil.rmtree(aside, ignore_errors=True)
    return place


def _model(ported: Path, settings: RunSettings, strategy: Mapping[str, Mapping[str, Any]], longest: int) -> Weights:
    import jax

    from perdure.jax import MHAR, Learner, Regressor, add_lora, load
    from perdure.jax.hidden import rounded
    from perdure.recipes.reactions.jax_learner import Weights

    frozen = settings.tuning != "full" and settings.precision == "bf16"
    backbone = load(
        ported,
        weights="bfloat16" if frozen else None,
        checkpointing=settings.gradient_checkpointing and settings.tuning != "head",
    )
    of_head, of_lora = jax.random.split(jax.random.key(settings.seed))
    if settings.tuning == "lora":
        backbone = add_lora(backbone, of_lora, settings.lora.r, settings.lora.alpha, targets(settings))
    head = settings.head
    made = MHAR(backbone.config.hidden_size, of_head, head.heads, head.hidden, head.dropout)
    return Weights(Learner(Regressor(backbone, made), fit_settings(settings, strategy, rounded(longest))))


def open_run(settings: RunSettings, folder: RunFolder, display: Display) -> Run:
    """The newest state of a run that is there, without training."""
    run = JaxRun(make_plan(settings, folder.recipe_folder, display.say), folder, display)
    run.load()
    return run
