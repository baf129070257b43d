"""What `perdure mix` is asked for, and what its runs and files are called."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from perdure.errors import ConfigError
from perdure.memory.select import policy_of

NONE = "none"
ALL = (NONE, "random", "difficulty_hard", "difficulty_easy", "loss_descending", "loss_ascending")
MODEL = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
TASK_A, TASK_B = "qwedsacf/competition_math", "hotpot_qa"


@dataclass(frozen=True, slots=True)
class Options:
    """The settings of a mixing experiment.

    Attributes:
        method: what is mixed in: "none", a selection policy, several with commas between, or "all".
        model: embedded name, folder or hub name.
        task_a: trained first; a hub name, a data file, or a YAML file with a task's settings.
        task_b: trained second.
        mix: share of the first task's training rows that is mixed in, in (0, 1].
        unit: what the share is of: "examples", or "tokens", which are targets.
        resample: whether the rows are chosen anew for each epoch.
        n_train: most training rows of each task.
        n_val: validation rows of each task, but at most a fifth of its rows.
        epochs_a: passes over the first task.
        epochs_b: passes over the second.
        eval_every: steps between two measurements of the second phase.
        generate_rows: validation rows of each task that answers are generated for.
        max_length: most tokens of a row; the model's limit holds too.
        batch_size: rows of a step.
        micro_batch_size: rows that go through the model together; None: what fits
            into 16,384 tokens with a GPU, else 8.
        lr: of AdamW.
        precision: "bf16" or "fp32".
        checkpointing: gradient checkpointing; None: with a GPU.
        field: the column that says how hard a row is.
        context: what stands before a HotpotQA question: "support", "full", or "auto".
        seed: of everything that is drawn.
        workers: selections trained at once; None: one with a GPU or a large model, else one for each core.
        out: folder of the experiment; None: one by model and seed.
    """

    method: str
    model: str = MODEL
    task_a: str = TASK_A
    task_b: str = TASK_B
    mix: float = 0.1
    unit: str = "examples"
    resample: bool = False
    n_train: int = 4000
    n_val: int = 400
    epochs_a: int = 2
    epochs_b: int = 2
    eval_every: int = 30
    generate_rows: int = 100
    max_length: int = 2048
    batch_size: int = 64
    micro_batch_size: int | None = None
    lr: float = 2e-4
    precision: str = "bf16"
    checkpointing: bool | None = None
    field: str = "level"
    context: str = "auto"
    seed: int = 42
    workers: int | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        mistakes = []
        if not 0 < self.mix <= 1:
            mistakes.append(f"--mix-percentage must be above 0 and at most 1 (0.1 is a tenth), got {self.mix:g}")
        for option, value, known in (
            ("--mix-unit", self.unit, ("examples", "tokens")),
            ("--context", self.context, ("auto", "support", "full")),
            ("--precision", self.precision, ("bf16", "fp32")),
        ):
            if value not in known:
                mistakes.append(f"{option} must be one of {', '.join(known)}, got {value!r}")
        if not self.lr > 0 or self.lr == float("inf"):
            mistakes.append(f"--lr must be positive, got {self.lr}")
        try:
            self.methods  # noqa: B018  every name is looked up
        except ConfigError as error:
            mistakes.append(f"--selection-method: {error} Also: {NONE}, all.")
        if mistakes:
            raise ConfigError("\n".join(mistakes))

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods asked for, in order, each once.

        Raises:
            ConfigError: an unknown one.
        """
        asked = [part.strip() for part in self.method.split(",") if part.strip()]
        found = [name for part in asked for name in (ALL if part == "all" else (part,))]
        if not found:
            raise ConfigError(f"none was given. Known: {', '.join(ALL)}, all, and the other policies")
        for name in found:
            if name != NONE:
                policy_of(name)
        if "surprise" in found and not self.resample:
            raise ConfigError("surprise needs --resample: right after learning no loss has risen yet")
        return tuple(dict.fromkeys(found))

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        name = Path(self.model).name or "model"
        return self.out or Path("runs") / f"mix-{name}-seed{self.seed}"

    def share(self, method: str) -> str:
        """What is mixed in, for names of files: "10pct", "12.5pct_tokens", "10pct_resampled"."""
        percent = float(Fraction(repr(self.mix)) * 100) if method != NONE else 0.0
        unit = "_tokens" if self.unit == "tokens" and method != NONE else ""
        anew = "_resampled" if self.resample and method != NONE else ""
        return f"{percent:g}pct{unit}{anew}"

    def slug(self, method: str) -> str:
        """The method with its share and the precision, as it stands in names of files."""
        return f"{method.replace(':', '-')}_{self.share(method)}_{self.precision}"

    def label(self, method: str) -> str:
        """The method in words, for legends and tables."""
        if method == NONE:
            return "none"
        unit = " of tokens" if self.unit == "tokens" else ""
        anew = ", resampled" if self.resample else ""
        return f"{method} {float(Fraction(repr(self.mix)) * 100):g} %{unit}{anew}"
