"""A run's settings: the only reader of config files and overrides; all mistakes are reported together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from perdure.errors import ConfigError, unknown_name

FORMAT = 1
OTHER_NAMES = {"learning_rate": "lr"}
YAML_BYTES, YAML_VALUES = 16 << 20, 1_000_000
Boundary = Literal["reset", "continue"]


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value  # refused, in the words of all other settings


# libyaml's is eight times as fast, and is not in every build.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# YAML 1.1 reads 1e-3 as a string; numbers given as text are numbers here.
Number = Annotated[float, BeforeValidator(_number)]


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused, and values are not changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OptimizerSettings(Settings):
    """The optimizer and what happens to its state when a task begins."""

    type: Literal["adam", "adamw", "sgd", "adafactor"] = "adamw"
    lr: Number = Field(1e-3, gt=0)
    weight_decay: Number = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Number = Field(1e-8, gt=0)
    momentum: Number = Field(0.0, ge=0, lt=1)
    fused: bool = False
    at_boundary: Boundary = "reset"


class ScheduleSettings(Settings):
    """The learning rate over the steps of a task ("reset") or of the whole stream ("continue")."""

    type: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Number = Field(0.0, ge=0, description="steps, or below 1 a share of all steps")
    at_boundary: Boundary = "reset"
    total_steps: int | None = Field(None, ge=1, description='horizon for "continue" where the stream is not known')


class LoraSettings(Settings):
    """LoRA adapters."""

    r: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: Number = Field(0.0, ge=0, lt=1)
    targets: list[str] | None = None


class SoftPromptSettings(Settings):
    """A soft prompt: trained embeddings that stand before every row."""

    tokens: int = Field(8, ge=1)
    init: Literal["vocabulary", "random", "text"] = "vocabulary"
    text: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _text_for_text(self) -> SoftPromptSettings:
        if (self.init == "text") != (self.text is not None):
            raise ValueError(f"init: text and a text go together, got init: {self.init} and text: {self.text!r}")
        return self


class HeadSettings(Settings):
    """A regression head on a backbone's hidden states."""

    type: Literal["mhar", "mean", "linear"] = "mhar"
    heads: int = Field(4, ge=1, description="of MHAR's attention; the hidden width must be an even multiple")
    hidden: int = Field(1024, ge=1, description="units of the last hidden layer")
    dropout: Number = Field(0.2, ge=0, lt=1)
    ensemble: int = Field(1, ge=1, description="heads that are trained side by side; their mean is the prediction")


class TrainingSettings(Settings):
    """All that the loop needs, for scripts and for runs alike."""

    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    continual_strategy: dict[str, dict[str, Any]] = {}
    batch_size: int = Field(32, ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    clip: Number | None = Field(None, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    evaluation_batch_size: int = Field(64, ge=1)
    skip_bad_batches: bool = False

    @model_validator(mode="after")
    def _divides(self) -> TrainingSettings:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size ({self.micro_batch_size}) must not exceed batch_size ({self.batch_size})"
            )
        return self


class EarlyStoppingSettings(Settings):
    """Stop training on a task when its held-out rows have got no better for a while."""

    patience: int = Field(3, ge=1, description="epochs in a row that are no better than the best")
    metric: Literal["loss", "accuracy", "rmse", "mae", "r2"] | None = Field(
        None, description="None: the objective's main metric, for causal_lm the loss"
    )
    min_delta: Number = Field(0.0, ge=0, description="a smaller gain is none")
    restore_best: bool = Field(True, description="go back to the end of the best epoch")


class TrainerSettings(TrainingSettings):
    """What only a script can ask for: a run's steps are fixed before it begins."""

    early_stopping: EarlyStoppingSettings | None = None
    score_epochs: bool = False


class EvaluationSettings(Settings):
    """What is measured before training and after every task."""

    exact_match: bool = True
    every: int | None = Field(None, ge=1, description="steps between losses within a stage; None: after it alone")
    each_epoch: bool = Field(False, description="whether the task under way is scored after each of its epochs")
    max_new_tokens: int | None = Field(None, ge=1, description="None: the longest reference answer and one more")
    before_training: bool = Field(True, description="whether answers are generated before any training too")
    generate_rows: int | None = Field(
        None, ge=1, description="rows a task that answers are generated for; None: all"
    )
    uncertainty: Literal["auto", "mc-dropout", "ensemble", "none"] = Field(
        "auto", description="of a regression's predictions; auto: what its head allows"
    )
    samples: int = Field(50, ge=2, description="of mc-dropout")


_ONLY_FOR_SCRIPTS = TrainerSettings.model_fields.keys() - TrainingSettings.model_fields.keys()
S = TypeVar("S", bound=Settings)


def validate(model: type[S], values: Mapping[str, Any], where: str) -> S:
    """Settings from a mapping.

    Raises:
        ConfigError: every mistake, each with its setting, its value and the way out.
    """
    newer = values.get("format", FORMAT)
    if isinstance(newer, int) and newer > FORMAT:
        raise ConfigError(f"{where}: format {newer} is newer than this perdure reads ({FORMAT}); upgrade perdure")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(explain(error, where, model)) from error


def explain(error: ValidationError, where: str, model: type[BaseModel] | None = None) -> str:
    """All mistakes of a validation as lines of text."""
    lines = []
    problems = error.errors()
    for problem in problems:
        location = problem["loc"]
        inner = any(len(p["loc"]) > len(location) and p["loc"][: len(location)] == location for p in problems)
        if inner and problem["type"] == "too_short":
            continue  # it is too short only because what is wrong with its items is said already
        key = ".".join(_parts(location)) or "(settings)"
        if problem["type"] == "extra_forbidden" and key in _ONLY_FOR_SCRIPTS:
            lines.append(
                f"{key}: only ContinualTrainer takes it. A run's steps are fixed before it begins; set its epochs"
            )
        elif problem["type"] == "extra_forbidden":
            known = _known(model, location)
            lines.append(unknown_name("setting", key, known, _inside(model, key) if len(location) == 1 else ()))
        elif problem["type"] == "missing":
            lines.append(f"{key}: missing")
        elif problem["type"] == "value_error":
            lines.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"{key}: {_rule(problem)}, got {problem['input']!r}"[:400])
    return f"{where}: " + ("\n  ".join([f"{len(lines)} mistakes", *lines]) if len(lines) > 1 else lines[0])


def _rule(problem: Any) -> str:
    """What the value must be."""
    if problem["type"] == "too_short":
        return f"must hold at least {problem['ctx']['min_length']}"
    if problem["type"] in ("model_type", "model_attributes_type"):
        return "must be a mapping of settings"
    return str(problem["msg"]).replace("Input should", "must").partition(", unable to parse")[0]


def _parts(location: Sequence[int | str]) -> list[str]:
    """The parts of a setting's key; a tag in parentheses only says which model a value was read as."""
    return [part for part in map(str, location) if not part.startswith("(")]


def _known(model: type[BaseModel] | None, location: Sequence[int | str]) -> list[str]:
    """Keys of the settings that could stand in the place of an unknown one."""
    current = [model] if model else []
    for part in location[:-1]:
        if isinstance(part, str) and part.startswith("("):
            current = [one for one in current if f"({one.__name__})" == part]
        elif isinstance(part, str):
            fields = [one.model_fields[part] for one in current if part in one.model_fields]
            current = [found for field in fields for found in _models(field.annotation)]
    return [".".join([*_parts(location[:-1]), name]) for one in current for name in one.model_fields]


def _inside(model: type[BaseModel] | None, name: str) -> list[str]:
    """Settings one level further in that have this name, or what other tools call so."""
    name = OTHER_NAMES.get(name, name)
    fields = model.model_fields.items() if model else ()
    return [f"{key}.{name}" for key, field in fields for m in _models(field.annotation) if name in m.model_fields]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's type names, whatever they are wrapped in."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models(argument)]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; ConfigError names file and line."""
    try:
        if path.stat().st_size > YAML_BYTES:
            raise ConfigError(f"{path}: larger than {YAML_BYTES >> 20} MiB, so no file of settings; check the path")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping of settings, got {type(values).__name__}")
    return values


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        yaml.YAMLError: not YAML; or aliases in it stand for more than can be meant, or for themselves.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except (RecursionError, OverflowError) as error:
        raise yaml.YAMLError("nested too deeply") from error
    except (ValueError, KeyError, AttributeError) as error:  # a date, number or truth value by its tag that is none
        raise yaml.YAMLError(f"a value is not what its tag says: {error}") from error
    finally:
        loader.dispose()


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values a node stands for with its aliases written out."""
    size = sizes.get(id(node), 1)
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and len(node.value) > 1000:
        raise yaml.MarkedYAMLError(problem=f"a number of {len(node.value)} digits", problem_mark=node.start_mark)
    if not size:
        raise yaml.MarkedYAMLError(problem="an alias stands for what it is part of", problem_mark=node.start_mark)
    if id(node) not in sizes and isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in keys:
                    said = f"{key.value!r} stands here for the second time"
                    raise yaml.MarkedYAMLError(problem=said, problem_mark=key.start_mark)
                keys.add(key.value)
    if id(node) not in sizes and isinstance(node, yaml.CollectionNode):
        sizes[id(node)] = 0  # being counted
        for child in node.value:
            size += sum(_size(inner, sizes) for inner in (child if isinstance(child, tuple) else (child,)))
            if size > YAML_VALUES:
                raise yaml.MarkedYAMLError(
                    problem=f"aliases make it stand for over {YAML_VALUES:,} values", problem_mark=node.start_mark
                )
    sizes[id(node)] = size
    return size


def apply_overrides(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """The mapping with `key.sub=value` assignments made; values are read as YAML."""
    result: dict[str, Any] = _copy(values)
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"--set {assignment!r}: must be key=value, as in --set optimizer.lr=3e-4")
        try:
            value = parse_yaml(text) if text else None
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {assignment!r}: the value is not valid YAML") from error
        *path, last = key.strip().split(".")
        place: Any = result
        for part in path:
            place = _enter(place, part, assignment)
        if isinstance(place, list):
            place[_index(place, last, assignment)] = value
        else:
            place[last] = value
    return result


def _enter(place: Any, part: str, assignment: str) -> Any:
    if isinstance(place, list):
        inner = place[_index(place, part, assignment)]
    else:
        inner = place.setdefault(part, {})
        if inner is None:
            inner = place[part] = {}
    if not isinstance(inner, dict | list):
        raise ConfigError(f"--set {assignment!r}: {part!r} is a single value, it has no settings inside")
    return inner


def _index(place: list[Any], part: str, assignment: str) -> int:
    if part.isdecimal() and int(part) < len(place):
        return int(part)
    raise ConfigError(f"--set {assignment!r}: {part!r} must be a position from 0 to {len(place) - 1}")


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
