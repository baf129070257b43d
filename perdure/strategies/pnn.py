"""Progressive neural networks: a new column for each task, which hears the older ones; those are frozen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from perdure.errors import StrategyError
from perdure.models import objectives
from perdure.models.adapters import moving
from perdure.strategies.base import Strategy
from perdure.strategies.columns import Columns, find_sites
from perdure.strategies.identity import Rule, check_rule, forward_by_task, surest
from perdure.strategies.nearest import Prototypes
from perdure.strategies.settings import whole
from perdure.types import Batch, Context, Objective, Output

NAME = "pnn"


class PNN(Strategy):
    """A column of its own for each task; lateral connections lead from every older column into it.

    The first column is the model. Each later one has its own copy of all that is trained, norms and running
    statistics included, which starts from what the model had before any training; laterals start at zero, so that
    a new column first computes just what the base did. With hᵢ⁽ʲ⁾ what layer i of column j takes in, layer i of
    column k gives

        Wᵢ⁽ᵏ⁾ hᵢ⁽ᵏ⁾ + bᵢ⁽ᵏ⁾ + Σ_{j<k} Uᵢ⁽ᵏʲ⁾ hᵢ⁽ʲ⁾,

    U of W's shape, for every trained linear and convolution layer but the first. Of a language model columns are
    adapters, and to what block i gives out is added Σ_{j<k} Uᵢ relu(Vᵢ h/rms(h)), with h what block i of column j
    gives out, and U and V of rank `rank`. Older columns run in eval mode and take no gradient.

    A row is answered by its task's column; by the newest, if the task was not begun.

    Args:
        rank: of the laterals of a language model; others have none.
        infer: whose task a row is where nobody tells: "nearest", of those that have ended, by its features in the
            first column (see `Prototypes`), or "surest", the one whose column is (see `surest`).

    Attributes:
        tasks: those begun, in order; task k has column k.
        prototypes: for "nearest", the mean features of each task that has ended.

    Source: Rusu et al. 2016 (arXiv:1606.04671).
    """

    name: ClassVar[str] = NAME
    summary: ClassVar[str] = "a new column for each task, fed by the older ones, which are frozen"
    needs: ClassVar[str] = (
        "a copy of what is trained, and laterals from each older column, a task; no stored rows; task ids, told or "
        "inferred"
    )
    cost: ClassVar[str] = "the k-th task's forward pass runs k columns, of which one is trained"
    source: ClassVar[str] = "Rusu et al. 2016 (arXiv:1606.04671)"
    wants_task_ids = True
    isolates = True
    renames = True
    owns_training = True

    def __init__(self, rank: int = 8, infer: Rule = "nearest") -> None:
        self.rank = whole(NAME, "rank", rank)
        self.infer = check_rule(NAME, infer)
        self.prototypes = Prototypes()
        self.tasks: list[str] = []
        self._base: dict[str, Tensor] = {}
        self._objective: Objective = "classification"

    def check(self, model: nn.Module, objective: Objective) -> None:
        """Of a language model only adapters are trained; and no columns are there yet."""
        self._objective = objective
        self.infers = self.infer == "nearest" or objective != "regression"
        if hasattr(model, NAME):
            raise StrategyError(
                f"pnn: the model has a part named {NAME!r} already, as one has that was trained with pnn before; "
                "give a fresh model"
            )
        if objectives.is_language_model(model):
            if not hasattr(model, "peft_config"):
                raise StrategyError(
                    "pnn: a column of a language model is an adapter; with all weights trained, it would be a copy "
                    "of the model for every task; tune LoRA or a soft prompt"
                )
            if not find_sites(model, ())[0]:
                raise StrategyError("pnn: the language model has no stack of blocks that laterals could lead to")

    def prepare(self, ctx: Context) -> None:
        """Add a column, from the second task on; remember at the first what columns start from."""
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in ctx.model.modules())
        if checkpointing or ctx.model._compiled_call_impl is not None:
            raise StrategyError(
                "pnn: gradient_checkpointing and compile call the model again, or another way, when another column "
                "is in place; leave them out"
            )
        if not self._base:
            self._base = {name: value.detach().cpu().clone() for name, value in moving(ctx.model).items()}
        if ctx.index:
            if not hasattr(ctx.model, NAME):
                ctx.model.add_module(NAME, Columns(list(self._base), *find_sites(ctx.model, list(self._base))))
            columns = _columns(ctx.model)
            columns.cut(ctx.index)
            columns.grow(ctx.model, self._base, self.rank, ctx.rng)
        self.tasks = [*self.tasks[: ctx.index], ctx.task.name]

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        """Each row through its task's column."""
        if len(self.tasks) < 2:
            return objectives.forward(model, batch)
        return forward_by_task(
            batch, lambda task, rows: _columns(model).run(model, rows, self._column(task)).logits
        )

    def identify(self, model: nn.Module, batch: Batch) -> list[str]:
        """The task that `infer` finds."""
        if self.infer == "nearest":
            return self.prototypes.nearest(model, batch, self._objective)
        return surest(self.forward, model, batch, self.tasks, self._objective)

    def after_task(self, ctx: Context) -> None:
        """Note what the task's rows look like in the first column, which is the model as it is."""
        if self.infer == "nearest":
            self.prototypes.learn(ctx)

    def serving(self, model: nn.Module, task: str) -> AbstractContextManager[Any] | None:
        """The first column is the model as it is; a later one needs those before it at every token."""
        return None if self._column(task) else nullcontext()

    def usage(self, model: nn.Module) -> dict[str, dict[str, int]]:
        """The weights of each column, its laterals included, by the layer that they belong to."""
        found: dict[str, dict[str, int]] = {}
        for column, task in enumerate(self.tasks):
            tensors = _columns(model).named_tensors(model, column) if column else dict(model.named_parameters())
            for name, value in tensors.items():
                if isinstance(value, nn.Parameter) and (column or name in self._base):
                    layer = found.setdefault(_layer(name, bool(column)), {})
                    layer[task] = layer.get(task, 0) + value.numel()
        return found

    def export(self, model: Any, folder: Path) -> None:
        """The first column as `save_pretrained` does; the others with their laterals in pnn.safetensors.

        PEFT's format has no place for laterals, and without them an adapter would answer otherwise. pnn.json says
        which column is which task's, and at which modules laterals add.
        """
        model.save_pretrained(folder)
        if len(self.tasks) < 2:
            return
        from safetensors.torch import save_file

        columns, tensors = _columns(model), {}
        for column in range(1, len(self.tasks)):
            for name, value in columns.named_tensors(model, column).items():
                tensors[f"{column}.{name}"] = value.detach().cpu().contiguous()
        save_file(tensors, folder / "pnn.safetensors")
        facts = {"format": 1, "tasks": self.tasks, "sites": columns.sites, "parts": columns.parts}
        (folder / "pnn.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        """Tasks, what columns start from, and prototypes; columns are the model's, and saved with it."""
        return {"tasks": list(self.tasks), "base": dict(self._base), "prototypes": self.prototypes.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore all of it."""
        self.tasks = list(state["tasks"])
        self.prototypes.load_state_dict(state["prototypes"])
        self._base = {name: value.clone() for name, value in state["base"].items()}

    def _column(self, task: str) -> int:
        return self.tasks.index(task) if task in self.tasks else max(len(self.tasks) - 1, 0)


def _columns(model: nn.Module) -> Columns:
    columns = model.get_submodule(NAME)
    assert isinstance(columns, Columns)
    return columns


def _layer(name: str, later: bool) -> str:
    """The model's module that a tensor belongs to: of WEIGHT, of own.WEIGHT, or of heard.OLDER.SITE.PART."""
    path = name.split(".")
    return ".".join(path[(2 if path[0] == "heard" else 1) if later else 0 : -1])
