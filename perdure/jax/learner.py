"""A regressor under training: its state, one step, the end of a task, predictions, and its checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from perdure.errors import ConfigError, DataError, NonFiniteError, RunError
from perdure.jax import checkpoint
from perdure.jax.hidden import HiddenStates, Tell
from perdure.jax.lora import trainable
from perdure.jax.mistral import but
from perdure.jax.regressor import Regressor
from perdure.jax.rows import Batch, Replayed, Row, RowTask, collate, digest, name_of, rows_before
from perdure.jax.settings import FitSettings
from perdure.jax.shard import shardings, spread
from perdure.jax.step import (
    Anchors,
    State,
    fold,
    hidden_states,
    make_optimizer,
    make_step,
    predict,
    predict_dropped,
    squared_gradients,
)
from perdure.jax.telling import Position, StepResult
from perdure.jax.tree import filled, map_named, named
from perdure.order import take

COMPUTED_IN = {"fp32": "float32", "bf16": "bfloat16"}
# Per-example gradients of this many weights are held at once (float32: 256 MiB).
HELD = 64_000_000


class Learner:
    """A regressor under training; all that changes is in `state` and `steps`.

    Each function is compiled once: batches have one shape, and the state's buffers are reused.

    Args:
        model: taken as it is; its weights are copied where they are trained.
        settings: how.
        mesh: of devices, see `perdure.jax.shard.make_mesh`; None: one device.

    Attributes:
        compilations: by function, how often it was compiled.

    Raises:
        ConfigError: a batch cannot be shared among the devices, or LoRA is to be trained and there is none.
    """

    def __init__(self, model: Regressor, settings: FitSettings, mesh: Mesh | None = None) -> None:
        self.settings = settings
        self.mesh = mesh
        self.steps = 0
        self.compilations: Counter[str] = Counter()
        if mesh is not None and (settings.slots % mesh.shape["data"] or settings.batch_size % mesh.shape["data"]):
            raise ConfigError(
                f"batch_size {settings.batch_size} (with replayed rows {settings.slots}) cannot be shared among "
                f"{mesh.shape['data']} devices; give a multiple"
            )
        backbone = but(model.backbone, dtype=COMPUTED_IN[settings.precision])
        model = eqx.tree_at(lambda m: m.backbone, model, backbone)
        trained, frozen = eqx.partition(model, trainable(model, settings.tuning))
        # Shapes, and all that is no array: heads, window, LoRA's scale, dropout.
        self._kind = sha256(repr(jax.tree.map(jnp.shape, model)).encode()).hexdigest()
        trained = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trained)
        self._frozen = self._placed(map_named(self._thawed, frozen))
        optimizer = make_optimizer(settings)
        self._step = self._compiled("step", make_step(settings, optimizer), donate=(0,))
        self._predict = self._compiled("predict", predict)
        self._dropped = self._compiled("predict_dropped", predict_dropped)
        self._states = self._compiled("hidden", hidden_states)
        self._hidden: HiddenStates | None = None
        self._squares = self._compiled("fisher", squared_gradients)
        self._fold = self._compiled("fold", fold)
        self._fresh = self._compiled("optimizer", optimizer.init)
        trained = self._placed(trained)
        anchors = None
        if settings.strategy == "ewc":
            zeros = jax.tree.map(jnp.zeros_like, trained)
            # The anchor of nothing is anywhere; it must not share its buffers with the weights, which are donated.
            anchors = self._placed(Anchors(zeros, jax.tree.map(jnp.copy, trained), jnp.zeros(())))
        self.state = State(trained, self._placed(self._fresh(trained)), anchors)
        self._replayed = Replayed([], None, settings.seed, "")
        self._taken = 0  # new rows of the task that were stepped on

    @property
    def model(self) -> Regressor:
        """The regressor as it is now; valid until the next step, which reuses its memory."""
        whole: Regressor = eqx.combine(self.state.trained, self._frozen)
        return whole

    def begin_task(self, earlier: Sequence[RowTask], task: RowTask, done: int = 0) -> None:
        """Make ready for a task.

        Args:
            earlier: the tasks before it.
            task: the one to train.
            done: steps of it that were taken; above 0 where training goes on, and then the optimizer is left alone.
        """
        if not task.rows:
            raise DataError(f"task {task.name!r}: there are no rows")
        if self.settings.strategy == "replay":
            self._replayed = Replayed(earlier, self.settings.memory, self.settings.seed, task.name)
        self._taken = rows_before(done, len(task.rows), self.settings.batch_size)
        if not done and self.settings.at_boundary == "reset":
            fresh = self._placed(self._fresh(self.state.trained))
            self.state = State(self.state.trained, fresh, self.state.anchors)

    def step(self, rows: Sequence[Row], lr: float | None = None) -> StepResult:
        """Take one step on these new rows and, with replay, on rows of earlier tasks.

        Raises:
            NonFiniteError: loss or gradient is nan or infinite; the weights are as they were.
        """
        taken = self._taken + len(rows)
        old = self._replayed.draw(self.settings.drawn(self._taken), self.settings.drawn(taken))
        result = self._advance(self.batch(rows, old), self.settings.lr if lr is None else lr)
        self._taken = taken
        return StepResult(*result, len(rows), len(old), (*rows, *old))

    def batch(self, rows: Sequence[Row], old: Sequence[Row] = ()) -> Batch:
        """The batch of a step, with each row's share in the loss; the shares sum to 1."""
        new_share = 0.5 / len(rows) if old and self.settings.gradient == "separate" else 1 / (len(rows) + len(old))
        old_share = 0.5 / len(old) if old and self.settings.gradient == "separate" else new_share
        shares = [new_share] * len(rows) + [old_share] * len(old)
        return self._collated([*rows, *old], shares, self.settings.slots)

    def _advance(self, batch: Batch, lr: float) -> tuple[float, float, float]:
        number = np.uint32(self.steps)
        self.state, *found = self._step(self.state, self._frozen, self._there(batch), np.float32(lr), number)
        loss, penalty, norm = (float(value) for value in found)
        if not np.isfinite(loss) or not np.isfinite(norm):
            raise NonFiniteError(
                f"step {self.steps + 1}: loss {loss}, gradient norm {norm}; the update was not made. A smaller lr "
                f"(now {lr:g}) or clip ({self.settings.clip}) may help"
            )
        self.steps += 1
        return loss, penalty, norm

    def end_task(self, task: RowTask) -> None:
        """With EWC, estimate the Fisher information on the task's rows and fold it in."""
        if self.state.anchors is None:
            return
        new = self.fisher(task)
        anchors = self._placed(self._fold(self.state.anchors, new, self.state.trained))
        self.state = State(self.state.trained, self.state.optimizer, anchors)

    def fisher(self, task: RowTask) -> Any:
        """The empirical Fisher information: each row's gradient, squared, then averaged over the task's rows."""
        rows: Sequence[Row] = task.rows
        if self.settings.fisher_rows is not None:
            rows = take(rows, self.settings.fisher_rows, self.settings.seed, "fisher", task.name, key=name_of)
        held = sum(leaf.size for leaf in jax.tree.leaves(self.state.trained))
        size = max(1, min(32, HELD // held))
        if self.mesh is not None:
            size = -(-size // self.mesh.shape["data"]) * self.mesh.shape["data"]
        total = jax.tree.map(jnp.zeros_like, self.state.trained)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = self._collated(part, [1.0] * len(part), size)
            found = self._squares(self.state.trained, self._frozen, self._there(batch))
            total = jax.tree.map(jnp.add, total, found)
        return jax.tree.map(lambda value: value / len(rows), total)

    def predict(self, rows: Sequence[Row], length: int | None = None) -> np.ndarray:
        """Predictions of these rows in eval mode, [rows], float32.

        Args:
            rows: any.
            length: tokens of a row of the batches; None: that of the settings. Another is compiled for anew.
        """
        found = [np.zeros(0, np.float32)]
        for part, batch in self._parts(rows, length):
            found.append(np.asarray(self._predict(self.state.trained, self._frozen, batch))[: len(part)])
        return np.concatenate(found)

    def predict_dropped(self, rows: Sequence[Row], samples: int, length: int | None = None) -> np.ndarray:
        """Predictions of these rows with dropout, [samples, rows], float32; the same at every call."""
        found = [np.zeros((samples, 0), np.float32)]
        key = jax.random.fold_in(jax.random.key(self.settings.seed), np.uint32(0xFFFFFFFF))  # no step's number
        for i, (part, batch) in enumerate(self._parts(rows, length)):
            keys = jax.random.split(jax.random.fold_in(key, i), samples)
            made = self._dropped(self.state.trained, self._frozen, batch, keys)
            found.append(np.asarray(made)[:, : len(part)])
        return np.concatenate(found, 1)

    def remember(self, rows: Sequence[Row], tell: Tell = lambda done, of: None) -> int:
        """Work out the hidden states of these rows once, and hold them; how many were new.

        From then on the backbone runs for rows alone that were not among them.

        Raises:
            ConfigError: the backbone is trained.
        """
        if self.settings.tuning != "head":
            raise ConfigError(
                f"tuning {self.settings.tuning}: the backbone is trained; hidden states would go stale"
            )
        if self._hidden is None:
            self._hidden = HiddenStates(self._forward, self.settings.batch_size, self.settings.length)
        return self._hidden.fill(rows, tell)

    def _forward(self, ids: np.ndarray) -> np.ndarray:
        there = ids if self.mesh is None else spread(ids, self.mesh)
        return np.asarray(self._states(self.state.trained, self._frozen, there))

    def _parts(self, rows: Sequence[Row], length: int | None) -> Iterator[tuple[Sequence[Row], Any]]:
        size = self.settings.batch_size
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield part, self._there(self._collated(part, [1.0] * len(part), size, length))

    def _collated(
        self, rows: Sequence[Row], weights: Sequence[float], size: int, length: int | None = None
    ) -> Batch:
        batch = collate(rows, weights, size, self.settings.length if length is None else length)
        return batch if self._hidden is None else self._hidden.into(batch, rows)

    def save(self, path: Path, position: Position, tasks: Sequence[RowTask]) -> None:
        """Write all that the rest of the training depends on as a folder, in one step.

        Raises:
            StorageError: the disk refused; what was at `path` is intact.
        """
        plain = {
            "position": asdict(position),
            "steps": self.steps,
            "settings": _as_json(self.settings),
            "tasks": digest(tasks),
            "model": self._kind,
        }
        checkpoint.save(path, named(self.state), plain)

    def load(self, path: Path, tasks: Sequence[RowTask]) -> Position:
        """Take up a training that was saved; where it stood.

        Raises:
            RunError: not a checkpoint, or one of other settings, tasks or kind of model. Other frozen weights of
                the same kind are not noticed.
        """
        arrays, plain = checkpoint.load(path)
        try:
            position = Position(**plain["position"])
            settings, of, steps = plain["settings"], plain["tasks"], int(plain["steps"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path}: not a checkpoint of this training: {error}") from error
        mine = _as_json(self.settings)
        other = [f"{k}: {settings.get(k)!r} then, {mine[k]!r} now" for k in mine if settings.get(k) != mine[k]]
        if other:
            raise RunError(f"{path}: was made with other settings ({'; '.join(other)})")
        if plain.get("model") != self._kind:
            raise RunError(f"{path}: was made with a model of another shape, scale of LoRA, window or dropout")
        if of != digest(tasks):
            raise RunError(f"{path}: was made with other tasks or rows; give the same data in the same order")
        wanted = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in named(self.state).items()}
        if wanted != {name: (value.shape, str(value.dtype)) for name, value in arrays.items()}:
            raise RunError(f"{path}: its weights are not those of this model")
        # A copy, as what was read cannot be written to and the step reuses its memory.
        self.state = self._placed(filled(self.state, {n: jnp.array(v, copy=True) for n, v in arrays.items()}))
        self.steps = steps
        return position

    def _compiled(
        self, name: str, function: Callable[..., Any], donate: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        def counted(*given: Any) -> Any:
            self.compilations[name] += 1  # this runs when it is traced, not when it is called
            # Else an NVIDIA GPU would take float32 for TF32, which has ten bits.
            with jax.default_matmul_precision("float32"):
                found = function(*given)
            if name == "step" and self.mesh is not None:
                # Else the compiler may choose others, and the next step would be compiled anew.
                state = jax.lax.with_sharding_constraint(found[0], shardings(found[0], self.mesh))
                found = (state, *found[1:])
            return found

        return jax.jit(counted, donate_argnums=donate)

    def _thawed(self, name: str, leaf: Any) -> Any:
        if self.settings.precision == "bf16" and not name.startswith("head.") and "norm" not in name:
            return leaf.astype(jnp.bfloat16)
        return leaf

    def _placed(self, tree: Any) -> Any:
        return tree if self.mesh is None else jax.device_put(tree, shardings(tree, self.mesh))

    def _there(self, batch: Batch) -> Any:
        return batch if self.mesh is None else spread(batch, self.mesh)


def _as_json(settings: FitSettings) -> dict[str, Any]:
    values = asdict(settings)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
