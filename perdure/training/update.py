"""How an online stream is learnt from: a few passes over the newest rows, or a meta-learner's two loops."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from perdure.config import OptimizerSettings
from perdure.errors import NonFiniteError
from perdure.training.learner import CURE, Learner, StepResult
from perdure.training.optim import build_optimizer, load_named_state, named_state
from perdure.types import Example


@dataclass(frozen=True, slots=True)
class Update:
    """What learning from a row did to the weights.

    Attributes:
        loss: mean over the targets of the last step, penalties included.
        lr: the learning rate of that step.
        steps: optimizer steps taken.
        rows: new rows that they learnt from.
        replayed: rows that a strategy added, in all steps.
        skipped: why the last step was left out, where it was.
    """

    loss: float
    lr: float
    steps: int
    rows: int = 1
    replayed: int = 0
    skipped: str | None = None


class Updates(Protocol):
    """Learns from one row at a time."""

    def learn(self, row: Example) -> Update | None:
        """Learn from a row; None where it only waits for others."""

    def state_dict(self) -> dict[str, Any]:
        """What it holds; rows by key."""

    def load_state_dict(self, state: Mapping[str, Any], rows: Mapping[str, Example]) -> None:
        """Go on from there, given the stream's rows by key."""


class Window:
    """A few optimizer steps on the newest rows, through the learner's strategy.

    Args:
        learner: whose steps they are.
        size: how many of the newest rows that were learnt from a step holds.
        passes: steps taken for each new row.
    """

    def __init__(self, learner: Learner, size: int = 1, passes: int = 1) -> None:
        self._learner, self._passes = learner, passes
        self._rows: deque[Example] = deque(maxlen=size)

    def learn(self, row: Example) -> Update:
        """Take a row in and step."""
        self._rows.append(row)
        rows = list({held.key: held for held in self._rows}.values())
        results = [self._step(rows) for _ in range(self._passes)]
        last = results[-1]
        replayed = sum(result.replayed_rows for result in results)
        return Update(last.loss, last.lr, len(results), 1, replayed, last.skipped)

    def _step(self, rows: Sequence[Example]) -> StepResult:
        """A step, taken again as long as its gradient overflows in fp16: the scale is lowered each time."""
        while (result := self._learner.step(rows)).overflow:
            pass
        return result

    def state_dict(self) -> dict[str, Any]:
        """The keys of the newest rows."""
        return {"window": [row.key for row in self._rows]}

    def load_state_dict(self, state: Mapping[str, Any], rows: Mapping[str, Example]) -> None:
        """Hold those rows again."""
        self._rows.extend(rows[key] for key in state["window"])


class MetaLearner:
    """Learning to learn: an inner loop adapts to a few rows of one kind, an outer step moves where it starts from.

    The inner loop is Adam without momentum and with a fresh state, as in Reptile's experiments. A meta-step
    takes `episodes` rows of one kind; those of others wait.

    Args:
        learner: with the model; its strategy's forward pass is used, and none of its other hooks.
        shots: rows that the inner loop adapts to.
        inner_steps: steps of the inner loop, each on all of these rows.
        inner_lr: its learning rate.
    """

    def __init__(self, learner: Learner, shots: int, inner_steps: int, inner_lr: float) -> None:
        self._learner, self._shots, self._steps, self._lr = learner, shots, inner_steps, inner_lr
        self._waiting: dict[str, list[Example]] = {}

    @property
    def episodes(self) -> int:
        """Episodes of one meta-step."""
        return self._shots

    def learn(self, row: Example) -> Update | None:
        """Wait until there are rows enough of its kind, then take a meta-step.

        Raises:
            NonFiniteError: the loss or gradient was; the weights are as before.
        """
        waiting = self._waiting.setdefault(row.task, [])
        waiting.append(row)
        if len(waiting) < self.episodes:
            return None
        rows = self._waiting.pop(row.task)
        start = self._copy()
        try:
            loss = self._meta_step(rows, start)
        except NonFiniteError:
            self._put(start)
            raise
        self._learner.steps += 1
        return Update(loss, self._outer_lr(), 1, len(rows))

    @contextmanager
    def adapted(self, rows: Sequence[Example]) -> Iterator[None]:
        """The model as the inner loop leaves it after these rows; put back afterwards."""
        start = self._copy()
        device = self._learner.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                self._adapt(rows)
                yield
            finally:
                self._put(start)

    def _meta_step(self, rows: Sequence[Example], start: Mapping[str, Tensor]) -> float:
        raise NotImplementedError

    def _outer_lr(self) -> float:
        raise NotImplementedError

    def _adapt(self, rows: Sequence[Example]) -> float:
        """Adapt to the rows in place; the loss on them before the last step."""
        parameters = list(self._parameters().values())
        inner = torch.optim.Adam(parameters, lr=self._lr, betas=(0.0, 0.999))
        loss = 0.0
        for _ in range(self._steps):
            loss = self._gradients(rows)
            inner.step()
        inner.zero_grad()
        return loss

    def _gradients(self, rows: Sequence[Example]) -> float:
        """The loss on the rows; its gradient, clipped, is left in `.grad`."""
        learner = self._learner
        parameters = list(self._parameters().values())
        for parameter in parameters:
            parameter.grad = None
        loss = learner.loss_of(list(rows), train=True)
        loss.backward()
        clip = math.inf if learner.settings.clip is None else learner.settings.clip
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
        value = float(loss.detach())
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise NonFiniteError(
                f"the loss is {value}, its gradient's norm {norm}, in a meta-learner's step on {rows[0].key!r}. "
                f"{CURE}"
            )
        return value

    def _parameters(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._learner.model.named_parameters() if p.requires_grad}

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._parameters().items()}

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(values[name])
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The keys of the rows that wait."""
        return {"waiting": {kind: [row.key for row in rows] for kind, rows in self._waiting.items()}}

    def load_state_dict(self, state: Mapping[str, Any], rows: Mapping[str, Example]) -> None:
        """Let those rows wait again."""
        self._waiting = {kind: [rows[key] for key in keys] for kind, keys in state["waiting"].items()}


class Reptile(MetaLearner):
    """Move the start a share of the way to where the inner loop ended: θ ← θ + ε(φ − θ).

    Args:
        step: ε, above 0, at most 1.

    Source: Nichol et al. 2018, "On First-Order Meta-Learning Algorithms" (arXiv:1803.02999).
    """

    def __init__(self, learner: Learner, shots: int, inner_steps: int, inner_lr: float, step: float) -> None:
        super().__init__(learner, shots, inner_steps, inner_lr)
        self._step = step

    def _meta_step(self, rows: Sequence[Example], start: Mapping[str, Tensor]) -> float:
        loss = self._adapt(rows)
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(start[name] + self._step * (parameter - start[name]))
        return loss

    def _outer_lr(self) -> float:
        return self._step


class FirstOrderMAML(MetaLearner):
    """Move the start by the gradient that other rows of the kind have where the inner loop ended.

    A meta-step takes 2 · shots rows: the first half is adapted to, the other gives the gradient. The derivative of
    the inner loop itself is taken to be the identity, which makes it first-order.

    Args:
        settings: of the outer optimizer.

    Source: Finn et al. 2017, "Model-Agnostic Meta-Learning" (arXiv:1703.03400), its first-order approximation.
    """

    def __init__(
        self, learner: Learner, shots: int, inner_steps: int, inner_lr: float, settings: OptimizerSettings
    ) -> None:
        super().__init__(learner, shots, inner_steps, inner_lr)
        self._settings = settings
        self._names = list(self._parameters())
        self._outer = build_optimizer(list(self._parameters().values()), settings)

    @property
    def episodes(self) -> int:
        """Episodes of one meta-step."""
        return 2 * self._shots

    def _meta_step(self, rows: Sequence[Example], start: Mapping[str, Tensor]) -> float:
        self._adapt(rows[: self._shots])
        loss = self._gradients(rows[self._shots :])
        gradients = {name: p.grad for name, p in self._parameters().items()}
        self._put(start)
        for name, parameter in self._parameters().items():
            parameter.grad = gradients[name]
        self._outer.step()
        self._outer.zero_grad()
        return loss

    def _outer_lr(self) -> float:
        return self._settings.lr

    def state_dict(self) -> dict[str, Any]:
        """The rows that wait, and the outer optimizer's state by name."""
        return {**super().state_dict(), "outer": named_state(self._outer, self._names)}

    def load_state_dict(self, state: Mapping[str, Any], rows: Mapping[str, Example]) -> None:
        """Take both back."""
        super().load_state_dict(state, rows)
        load_named_state(self._outer, self._names, state["outer"])
