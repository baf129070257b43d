"""A stream's settings, as they stand in a recipe, and the stream that follows from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, Tag, field_validator, model_validator

from perdure.errors import DataError, unknown_name
from perdure.order import fingerprint
from perdure.storage import there
from perdure.streams import arena
from perdure.streams.answers import PLAIN, RULES
from perdure.streams.arena import ALL_KINDS, FORMS, KINDS, LEVELS
from perdure.streams.encode import Encoder
from perdure.streams.hotpot import HELPERS, PREPARATIONS, prepare, select
from perdure.streams.reactions import ReactionsSpec
from perdure.streams.sources import is_hub_name, read_rows
from perdure.streams.stream import Stream, first_encoded, hold_out, text_of
from perdure.streams.text import Template, to_examples
from perdure.types import Example, Segment, Task

HOLDOUT = 0.1


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PieceSpec(_Settings):
    """A piece of a template."""

    text: str
    learn: StrictBool = False
    cut: StrictBool = False
    special: StrictBool = False


class TemplateSpec(_Settings):
    """A template of prompt and answer; the context stands in front and is shortened first."""

    answer: str = Field(description="what is learnt, with a `{column}` or several")
    prompt: str = Field("", description="what stands before it")
    context: str = Field("", description="what stands before the prompt; shortened where a row is too long")


def _template_kind(value: Any) -> str:
    # Told apart first, so that a mistake in one is not explained by the other.
    return "(PieceSpec)" if isinstance(value, list | tuple) else "(TemplateSpec)"


class TaskSpec(_Settings):
    """One task from data."""

    name: str = Field(min_length=1, pattern=r"^[^\x00]*$", description="its own within the stream")
    train: str = Field(min_length=1, description="data file, datasets folder, or hub name owner/name[:config]")
    evaluation: str | None = Field(None, description="the same; without it rows are held out of `train`")
    holdout: float | int | None = Field(None, ge=0, description="share or number of rows held out by key hash")
    config: str | None = Field(None, description="configuration of a hub data set that has several")
    split: str | None = Field(None, description="split of a `train` that has several")
    evaluation_split: str | None = Field(None, description="split of an `evaluation` that has several")
    prepare: str = Field("none", description="named preparation of the rows")
    template: (
        Annotated[
            Annotated[TemplateSpec, Tag("(TemplateSpec)")]
            | Annotated[list[PieceSpec], Field(min_length=1), Tag("(PieceSpec)")],
            Discriminator(_template_kind),
        ]
        | None
    ) = Field(None, description="how columns become text: prompt, answer and context, or a list of pieces")
    where: dict[str, Any] = Field(default_factory=dict, description="keep rows whose columns have these values")
    key: str | None = Field(None, description="column that names a row; default: id, else a hash of the row")
    epochs: int | None = Field(None, ge=1, description="passes over the training rows; default: the run's")
    train_rows: int | None = Field(None, ge=1, description="most training rows")
    evaluation_rows: int | None = Field(None, ge=1, description="most evaluation rows")
    answer_tokens: int | None = Field(None, ge=2, description="most learnt tokens of a row, its end counted")
    answers: str = Field(PLAIN, description="named rule by which answers are scored")

    @field_validator("prepare")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in PREPARATIONS:
            raise ValueError(unknown_name("preparation", value, PREPARATIONS))
        return value

    @field_validator("answers")
    @classmethod
    def _known_rule(cls, value: str) -> str:
        if value not in RULES:
            raise ValueError(unknown_name("rule for answers", value, RULES))
        return value

    @field_validator("template")
    @classmethod
    def _well_formed(cls, value: Any) -> Any:
        if value is not None:
            template_of(value)
        return value

    @model_validator(mode="after")
    def _agree(self) -> TaskSpec:
        if isinstance(self.holdout, float) and self.holdout >= 1:
            raise ValueError(f"holdout is a share below 1 or a whole number of rows, got {self.holdout}")
        if self.evaluation is not None and self.holdout:
            raise ValueError("holdout and evaluation exclude each other: give one of them")
        if self.evaluation is None and self.evaluation_split is not None:
            raise ValueError("evaluation_split needs evaluation: name the source that has the split")
        return self


class ArenaSpec(_Settings):
    """The arena's generated tasks."""

    kinds: tuple[str, ...] = Field(KINDS, min_length=1, description="a task each, in this order")
    train_rows: int = Field(300, ge=1, description="training rows of each task")
    evaluation_rows: int = Field(100, ge=0, description="held-out rows of each task")
    levels: tuple[int, ...] = Field(LEVELS, min_length=1, description="levels of difficulty, 1 to 5, mixed evenly")
    forms: int = Field(FORMS, description="how many wordings the prompts of a kind have, 1 to 12")

    @field_validator("kinds")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for kind in value:
            if kind not in ALL_KINDS:
                raise ValueError(unknown_name("arena kind", kind, ALL_KINDS))
        if len(set(value)) < len(value):
            raise ValueError(f"kinds must differ, got {list(value)}")
        return value

    @field_validator("levels")
    @classmethod
    def _known_levels(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        arena.check_levels(value)
        return value

    @field_validator("forms")
    @classmethod
    def _known_forms(cls, value: int) -> int:
        return arena.count_forms(value)


class StreamSpec(_Settings):
    """A stream: tasks from data, the arena's, or reactions."""

    tasks: tuple[TaskSpec, ...] | None = Field(None, min_length=1, description="tasks from data, in order")
    arena: ArenaSpec | None = Field(None, description="or generated tasks")
    reactions: ReactionsSpec | None = Field(None, description="or a table of reactions with their yields")

    @model_validator(mode="after")
    def _one_kind(self) -> StreamSpec:
        if sum(kind is not None for kind in (self.tasks, self.arena, self.reactions)) != 1:
            raise ValueError(
                "give one of tasks (a list of data sources), arena (generated tasks), reactions (a table of yields)"
            )
        names = [task.name for task in self.tasks or ()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"task names must differ, but {twice} stand(s) more than once")
        return self


def template_of(spec: TemplateSpec | Sequence[PieceSpec]) -> Template:
    """The template that its settings describe."""
    if isinstance(spec, TemplateSpec):
        return Template.of(spec.model_dump())
    return Template.of([piece.model_dump() for piece in spec])


def build(
    spec: StreamSpec,
    data_dir: str | Path | None,
    seed: int,
    encoder: Encoder,
    base: str | Path | None = None,
    probe: Sequence[Example] = (),
    erased: Set[str] = frozenset(),
) -> tuple[Stream, dict[str, Any]]:
    """The stream that the settings describe, encoded, and the facts about its data as plain values.

    Args:
        spec: the settings.
        data_dir: where relative paths are looked up first, if given.
        seed: of splits, caps and generated tasks.
        encoder: its answer limit holds for tasks that set none.
        base: the recipe's folder, where relative paths are looked up next; the current folder comes last.
        probe: rows that are scored beside the stream's; no task trains on them.
        erased: fingerprints of keys whose rows count as if they were not there.

    Raises:
        DataError: a source is missing, malformed, or leaves a task without training rows.
    """
    return _assemble(_drafts(spec, data_dir, seed, encoder, base, erased), (), seed, probe)


def _drafts(
    spec: StreamSpec,
    data_dir: str | Path | None,
    seed: int,
    encoder: Encoder,
    base: str | Path | None,
    erased: Set[str],
) -> list[_Draft]:
    if spec.arena is not None:
        return _arena(spec.arena, seed, encoder, erased)
    places = [Path(place) for place in (data_dir, base) if place is not None]
    return [_Draft.load(task, places, seed, encoder, erased) for task in spec.tasks or ()]


def rows_of(
    spec: StreamSpec,
    data_dir: str | Path | None,
    seed: int,
    encoder: Encoder,
    base: str | Path | None = None,
    erased: Set[str] = frozenset(),
) -> list[Example]:
    """All rows that the sources of a stream hold, before caps and before any are left out; as in `build`."""
    return [row for draft in _drafts(spec, data_dir, seed, encoder, base, erased) for row in draft.rows]


def build_task(
    spec: TaskSpec,
    data_dir: str | Path | None,
    seed: int,
    encoder: Encoder,
    base: str | Path | None = None,
    earlier: Sequence[Task] = (),
    probe: Sequence[Example] = (),
    erased: Set[str] = frozenset(),
) -> tuple[Task, dict[str, Any]]:
    """One more task, for a stream that has been trained already; as in `build`.

    Rows that stand in the probe or the evaluation of an `earlier` task are not trained on, and rows that an earlier
    task was trained on are not evaluated.
    """
    places = [Path(place) for place in (data_dir, base) if place is not None]
    stream, facts = _assemble([_Draft.load(spec, places, seed, encoder, erased)], earlier, seed, probe)
    return stream.tasks[0], facts


class _Draft:
    """A task between its rows and its encoded examples."""

    def __init__(
        self,
        name: str,
        train: Sequence[Example],
        evaluation: Sequence[Example],
        caps: tuple[int | None, int | None],
        encoder: Encoder,
        facts: dict[str, Any],
    ) -> None:
        self.name, self.train, self.evaluation, self.facts = name, train, evaluation, facts
        self.train_rows, self.evaluation_rows = caps
        self.encoders = {"train": encoder.limited(encoder.answer_limit)}
        self.encoders["evaluation"] = encoder.limited(encoder.answer_limit)

    @property
    def rows(self) -> list[Example]:
        return [*self.train, *self.evaluation]

    @classmethod
    def load(cls, spec: TaskSpec, places: Sequence[Path], seed: int, encoder: Encoder, erased: Set[str]) -> _Draft:
        facts: dict[str, Any] = {"sources": {}, "train": {}, "evaluation": {}}

        def read(source: str, part: str, split: str | None, prefer: tuple[str, ...]) -> list[Example]:
            rows = read_rows(locate(source, places), split=split, config=spec.config, prefer=prefer)
            facts["sources"].update(rows.origins)
            facts[part]["rows"] = len(rows)
            prepared = prepare(rows, spec.prepare)
            selected = select(prepared, spec.where)
            facts[part]["unprepared"] = len(rows) - len(prepared)
            facts[part]["filtered"] = len(prepared) - len(selected)
            examples, facts[part]["duplicates"] = to_examples(
                selected,
                task=spec.name,
                template=None if spec.template is None else template_of(spec.template),
                key=spec.key,
                tokenizer=encoder.tokenizer,
                helpers=HELPERS.get(spec.prepare, ()),
            )
            return [example for example in examples if not erased or fingerprint(example.key) not in erased]

        limited = encoder if spec.answer_tokens is None else encoder.limited(spec.answer_tokens)
        train = read(spec.train, "train", spec.split, ("train",))
        if spec.evaluation is not None:
            held = read(spec.evaluation, "evaluation", spec.evaluation_split, ("test", "validation", "dev"))
        else:
            holdout = HOLDOUT if spec.holdout is None else spec.holdout
            # With a report of its own: what is left out counts once, where it was to be used.
            encode = encoder.limited(limited.answer_limit).encode_many
            train, held = hold_out(train, holdout, seed, spec.name, encode)
            facts["evaluation"]["rows"] = facts["train"]["held_out"] = len(held)
        return cls(spec.name, train, held, (spec.train_rows, spec.evaluation_rows), limited, facts)

    def choose(self, part: str, seed: int, banned: Callable[[str], bool]) -> list[Example]:
        """The encoded examples of a part, capped by key hash; one that does not fit is replaced by the next."""
        examples: Sequence[Example] = getattr(self, part)
        cap: int | None = getattr(self, f"{part}_rows")
        allowed = [example for example in examples if not banned(text_of(example))]
        facts = self.facts[part]
        facts["overlapping"] = len(examples) - len(allowed)
        encoder = self.encoders[part]
        kept = first_encoded(allowed, cap, encoder.encode_many, seed, f"{part}-cap", self.name)
        facts.update(encoder.report())
        facts["asked"] = cap
        return [kept[example.key] for example in allowed if example.key in kept]


def _assemble(
    drafts: Sequence[_Draft], earlier: Sequence[Task], seed: int, probe: Sequence[Example]
) -> tuple[Stream, dict[str, Any]]:
    """Evaluation rows first, for no training row may be one of them, of whatever task."""
    trained = {text_of(example) for task in earlier for example in task.train} - {""}
    held = [draft.choose("evaluation", seed, lambda text: text in trained) for draft in drafts]
    scored = [*held, *(task.evaluation for task in earlier), probe]
    texts = {text_of(example) for examples in scored for example in examples} - {""}
    tasks, facts = [], []
    for draft, evaluation in zip(drafts, held, strict=True):
        train = draft.choose("train", seed, lambda text: text in texts)
        if not train:
            raise DataError(f"task {draft.name!r} has no training rows left: {_why(draft.facts['train'])}.")
        tasks.append(Task(draft.name, train, evaluation))
        facts.append({"name": draft.name, **draft.facts, "notes": _notes(draft)})
    return Stream(tasks), {"tasks": facts}


def _why(facts: Mapping[str, Any]) -> str:
    reasons = [f"{count} {reason}" for reason, count in facts["left_out"].items()]
    reasons += [f"{facts['overlapping']} also stand in an evaluation"] if facts["overlapping"] else []
    reasons += [f"{facts['held_out']} held out"] if facts.get("held_out") else []
    return f"of {facts['rows']} rows read, " + (", ".join(reasons) or "all were filtered or erased")


def _notes(draft: _Draft) -> list[str]:
    """What the user asked for and did not get, in words."""
    return [
        f"task {draft.name}: {facts['kept']} {part} rows, {facts['asked']} were asked for ({_why(facts)})"
        for part in ("train", "evaluation")
        if (facts := draft.facts[part])["asked"] is not None and facts["kept"] < facts["asked"]
    ]


def check_inside(source: str) -> None:
    """DataError where a relative path leads out of the folder that it is looked up in.

    A recipe from somebody else must not reach by its own position for what lies about it.
    """
    path = Path(source).expanduser()
    if not path.is_absolute() and os.path.normpath(path).split(os.sep)[0] == os.pardir:
        raise DataError(
            f"{source}: leads out of the folder it is looked up in. Name a folder above it with --data and write "
            "the path from there, or write it in full."
        )


def locate(source: str, places: Sequence[Path]) -> str | Path:
    """Where a source stands: in the first of the places, or the current folder, that has it; else a hub name.

    Raises:
        DataError: it is spelt like a file and is in none of them; or it is relative and leads out of them.
    """
    check_inside(source)
    path = Path(source).expanduser()
    tried = [path] if path.is_absolute() else [place / path for place in (*places, Path())]
    for candidate in tried:
        if there(candidate):
            return candidate
    if is_hub_name(source):
        return source
    looked = ", ".join(map(str, dict.fromkeys(tried)))
    raise DataError(
        f"{source}: no such file or folder; looked for {looked}. Check the name, or name its folder with --data."
    )


def _arena(spec: ArenaSpec, seed: int, encoder: Encoder, erased: Set[str]) -> list[_Draft]:
    def examples(items: Sequence[arena.Item]) -> list[Example]:
        return [
            Example(
                item.key,
                item.kind,
                (Segment(item.prompt), Segment(item.answer, learn=True)),
                fields={"kind": item.kind, "level": item.level},
            )
            for item in items
            if fingerprint(item.key) not in erased
        ]

    drafts = []
    caps = (spec.train_rows, spec.evaluation_rows)
    for kind in spec.kinds:
        try:
            parts = arena.split(kind, *caps, seed, levels=spec.levels, forms=spec.forms)
        except ValueError as error:
            raise DataError(f"stream.arena: {error}, or name more under stream.arena.levels") from error
        train, evaluation = map(examples, parts)
        facts: dict[str, Any] = {
            "sources": {},
            "train": {"rows": len(train), "duplicates": 0},
            "evaluation": {"rows": len(evaluation), "duplicates": 0},
        }
        drafts.append(_Draft(kind, train, evaluation, caps, encoder, facts))
    return drafts
