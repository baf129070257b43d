"""`perdure arena`: a model learns from one problem at a time, and is examined on others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.config import read_yaml, validate
from perdure.errors import ConfigError, RunError
from perdure.order import priority, take
from perdure.recipes.arena.options import ArenaSettings, Options, default_out, settings_of
from perdure.recipes.run import quieten
from perdure.recipes.track import stopped
from perdure.streams.arena import Item, check_disjoint, generate, short
from perdure.training.display import Display, Terminal
from perdure.training.folder import RECORDED, RunFolder

if TYPE_CHECKING:
    from perdure.training.learner import Learner
    from perdure.training.online import OnlinePlan
    from perdure.training.update import MetaLearner, Updates
    from perdure.types import Example


def run_arena(
    options: Options, overrides: Sequence[str], resume: bool, again: str, track: Sequence[str] = ()
) -> None:
    """Run an arena run in its folder and print what came of it.

    Raises:
        UsageError: a mistake in what was asked.
    """
    from perdure.recipes.arena.results import CURVES, draw, finish
    from perdure.recipes.arena.show import print_results
    from perdure.tracking import build
    from perdure.training.online import Online

    settings = settings_of(options, overrides)
    folder = RunFolder(options.out or default_out(settings))
    display = Terminal()
    if folder.exists and not resume:
        raise RunError(f"{folder.path} holds a run already: add --resume to go on with it, or give another --out")
    if resume and folder.exists:
        folder.refuse_changed(_changes(folder, settings))
        if folder.results.is_file():
            if not (folder.path / CURVES).is_file():
                draw(folder)
            display.say(f"{folder.path}: this run is finished; nothing to do")
            print_results(_read(folder.results))
            return
    quieten()
    trackers = build(track, folder.path, display.say)
    with folder.locked(), stopped(trackers):
        plan = make_plan(settings, display, again, trackers)
        history = Online(plan, folder, display, again).execute()
        results = finish(plan, history, folder, again)
        for tracker in trackers:
            tracker.end(results, [folder.config, folder.results, *sorted(folder.path.glob("*.png"))])
    print_results(results)
    display.say(f"results in {folder.path}: results.json, learning_curves.png, checkpoint_ep*/")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}. Remove it, and go on with --resume") from error


def read_settings(folder: RunFolder) -> ArenaSettings:
    """The settings of the arena run that is here.

    Raises:
        ConfigError: its config.yaml was changed into something unreadable.
    """
    values = read_yaml(folder.config)
    values.pop(RECORDED, None)
    return validate(ArenaSettings, values, str(folder.config))


def _changes(folder: RunFolder, settings: ArenaSettings) -> list[str]:
    from perdure.training.plan import changed_settings

    return changed_settings(_fixed(read_settings(folder)), _fixed(settings))


def _fixed(settings: ArenaSettings) -> dict[str, Any]:
    """The settings that a run cannot go on without; those that are left out change rounding or names alone."""
    free = {"name", "evaluation_batch_size", "micro_batch_size", "device", "compile", "gradient_checkpointing"}
    return settings.model_dump(mode="json", exclude=free)


def make_plan(
    settings: ArenaSettings, display: Display, again: str = "", trackers: Sequence[Any] = ()
) -> OnlinePlan:
    """Build everything that the settings name.

    Raises:
        UsageError: any mistake in what was asked.
    """
    check_boundaries(settings)
    import torch

    from perdure.config import EvaluationSettings
    from perdure.models.adapters import count_parameters, count_virtual_tokens, tune
    from perdure.models.load import NANO, identify, load
    from perdure.models.objectives import count_targets
    from perdure.recipes.arena.exam import ArenaExam, to_rows
    from perdure.strategies.build import build
    from perdure.streams.encode import Encoder
    from perdure.streams.spec import TaskSpec, build_task
    from perdure.training.episodes import Episodes
    from perdure.training.learner import Learner
    from perdure.training.measure import Measure
    from perdure.training.online import OnlinePlan
    from perdure.training.plan import PROBE, hash_rows, machine, versions, with_capacity
    from perdure.training.telling import write_model

    torch.manual_seed(settings.seed)
    language = load(settings.model)
    model = tune(
        language.model,
        settings.tuning,
        **settings.lora.model_dump(),
        **settings.soft_prompt.model_dump(),
        tokenizer=language.tokenizer,
    )
    strategy = build(settings.strategy, with_capacity(settings.continual_strategy, settings.pool))
    learner = Learner(model, strategy, "causal_lm", settings, settings.seed)
    room = language.max_length - count_virtual_tokens(model) - strategy.virtual_tokens
    encoder = Encoder(language.tokenizer, room)
    pool, held_out = problems(settings)
    rows = to_rows(pool, encoder)
    online = settings.online
    meta = _meta(settings, learner)
    episodes = Episodes(
        rows,
        online.episodes,
        settings.seed,
        drift=online.drift,
        curriculum=online.curriculum,
        kinds=settings.kinds,
        group=meta.episodes if meta else 1,
    )
    measure = Measure(learner, encoder, EvaluationSettings(), settings.seed)
    probe: Sequence[Example] = ()
    if settings.probe:
        spec = TaskSpec(name=PROBE, train=str(NANO / "probe.jsonl"), holdout=0)
        probe = build_task(spec, None, settings.seed, encoder, None)[0].train
    nano = Path(language.source) == NANO
    exam = ArenaExam(
        measure, held_out, probe, nano, online.episodes, _adapting(settings, learner, meta, rows) if meta else None
    )
    trainable, total = count_parameters(model)
    each = " for each kind" if settings.method == "multi-lora" else ""
    for kind, (asked, found) in short_of(settings, pool).items():
        display.say(f"{kind}: {found} problems to draw from in place of {asked}: these levels have no more")
    display.say(
        f"{settings.method} on {language.name}: {trainable:,} of {total:,} parameters trainable{each}; "
        f"{online.episodes} episodes from {len(pool):,} problems, examined on {len(held_out)} others"
    )
    identity = {
        "settings": _fixed(settings),
        "pool": hash_rows(rows),
        "held_out": hash_rows(exam.paper.rows),
        "probe": hash_rows(probe),
        "base": identify(language),
    }
    recorded = {"command": again, "versions": versions(), "machine": machine()}
    return OnlinePlan(
        settings,
        recorded,
        online,
        learner,
        _updates(settings, learner, meta),
        episodes,
        measure,
        exam,
        max(exam.longest, *(count_targets(row, "causal_lm") for row in rows)),
        lambda path: write_model(strategy, model, language.tokenizer, path),
        identity,
        tuple(trackers),
    )


def check_boundaries(settings: ArenaSettings) -> None:
    """Refuse a strategy that needs ends of tasks where the stream has none, before anything is loaded."""
    from perdure.strategies.base import Strategy
    from perdure.strategies.build import build
    from perdure.training.plan import STREAM_MODES, with_capacity

    online, name = settings.online, settings.strategy
    if name in STREAM_MODES:
        raise ConfigError(f"--strategy {name}: an online stream has one order; leave it out for plain learning")
    strategy = build(name, with_capacity(settings.continual_strategy, settings.pool))
    blocks = online.drift == "blocks"
    if strategy.needs_boundaries and not (blocks or online.task_every):
        raise ConfigError(
            f"--strategy {name} does its work when a task ends, and this stream has no tasks: give --task-every N "
            "(a task ends after every N episodes), or --drift blocks (one kind after another)"
            + ("; or, in place of it, --replay reservoir, which needs none" if "replay" in name else "")
        )
    members = getattr(strategy, "strategies", [strategy])
    if any(type(member).after_phase is not Strategy.after_phase for member in members):
        raise ConfigError(
            f"--strategy {name} trains a task in several phases, and an online stream has one; use `perdure run`"
        )
    told = any(member.needs_boundaries and member.wants_task_ids for member in members)
    if told and (not blocks or online.task_every):
        raise ConfigError(
            f"--strategy {name} keeps a part for each task and is told a row's task by its kind: only --drift "
            "blocks, without --task-every, has one task a kind"
        )


def problems(settings: ArenaSettings) -> tuple[list[Item], list[Item]]:
    """The pool that episodes draw from and the held-out problems, equally many of each kind, strictly apart.

    Where the levels of a kind have no more, the pool has fewer of it.

    Raises:
        ConfigError: there are not enough held-out problems of a kind, or no others beside them.
    """
    pool: list[Item] = []
    held_out: list[Item] = []
    for number, kind in enumerate(settings.kinds):
        counts = [_share(total, number, len(settings.kinds)) for total in (settings.pool, settings.eval_tasks)]
        try:
            # Held-out problems come first, from a seed of their own: they are the same however large the pool is.
            held = generate(
                kind, counts[1], settings.seed, levels=settings.levels, forms=settings.forms, apart=True
            )
            train = generate(
                kind,
                counts[0],
                priority(settings.seed, "pool", key=kind),
                exclude=frozenset(text for item in held for text in (*item.texts, item.kin) if text),
                levels=settings.levels,
                forms=settings.forms,
                apart=True,
                fewer=True,
            )
            check_disjoint(train, held, apart=True)
        except ValueError as error:
            raise ConfigError(f"{error}; --eval-tasks N says how many are held out") from error
        if not train:
            raise ConfigError(
                f"kind '{kind}' has no problems at these levels beside the {len(held)} that are held out; give a "
                "smaller --eval-tasks, or more --levels"
            )
        pool += train
        held_out += held
    if settings.answers == "short":
        return [short(item) for item in pool], [short(item) for item in held_out]
    return pool, held_out


def short_of(settings: ArenaSettings, pool: Sequence[Item]) -> dict[str, tuple[int, int]]:
    """Kinds of which the pool has fewer problems than were asked for: how many were, and how many it has."""
    found = {}
    for number, kind in enumerate(settings.kinds):
        asked = _share(settings.pool, number, len(settings.kinds))
        if (held := sum(item.kind == kind for item in pool)) < asked:
            found[kind] = (asked, held)
    return found


def _share(total: int, number: int, parts: int) -> int:
    """The number-th of so many parts of a total that are as equal as can be."""
    return total // parts + (number < total % parts)


def _meta(settings: ArenaSettings, learner: Learner) -> MetaLearner | None:
    from perdure.training.update import FirstOrderMAML, Reptile

    meta = settings.meta
    if settings.method == "reptile":
        return Reptile(learner, meta.shots, meta.inner_steps, meta.inner_lr or settings.optimizer.lr, meta.step)
    if settings.method == "maml":
        return FirstOrderMAML(learner, meta.shots, meta.inner_steps, meta.inner_lr or 3e-4, settings.optimizer)
    return None


def _updates(settings: ArenaSettings, learner: Learner, meta: MetaLearner | None) -> Updates:
    from perdure.training.update import Window

    return meta or Window(learner, settings.online.window, settings.online.passes)


def _adapting(
    settings: ArenaSettings, learner: Learner, meta: MetaLearner, rows: Sequence[Example]
) -> Callable[[str], AbstractContextManager[None]]:
    """Kind -> the model adapted to a few of the pool's rows of that kind, always the same ones."""

    def adapt(kind: str) -> AbstractContextManager[None]:
        own = [row for row in rows if row.task == kind]
        return meta.adapted(take(own, settings.meta.shots, settings.seed, "shots", kind, key=lambda row: row.key))

    return adapt
