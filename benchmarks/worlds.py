"""What the study runs: its strategies with their settings, and its worlds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import encoder

TUNING_SEED = 10
MINILM = ("minilm-frozen", "minilm-lora")
PLACES = ("arena", *MINILM)
# Worlds of rows that name them only.
ASKED = ("arena-lora",)


@dataclass(frozen=True)
class Row:
    """A strategy of the study.

    Attributes:
        build: what `perdure.strategies.build` takes: names joined by "+", or "joint" or "isolated".
        family: what the figure's colour says.
        settings: by world, "*" for all of them: constructor settings as "strategy.setting". A `capacity` may be a
            share of the stream's rows, a `per_task` one of a task's rows; at 5% both hold equally many in the end.
        grid: what `--tune` tries, by world: setting → values.
        worlds: where it runs; None is everywhere but in the worlds of `ASKED`.
        training: by world, settings of the loop that differ from the world's own, flat.
    """

    build: str
    family: str
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    grid: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    worlds: tuple[str, ...] | None = None
    training: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def for_world(self, world: str) -> dict[str, Any]:
        """The settings in one world, flat."""
        return {**self.settings.get("*", {}), **self.settings.get(world, {})}

    def grid_for(self, world: str) -> Mapping[str, Sequence[Any]]:
        """What is tried there; nothing where there is nothing to tune."""
        return self.grid.get(world, self.grid.get("*", {}))


def _by_world(setting: str, arena: Any, frozen: Any, lora: Any) -> dict[str, dict[str, Any]]:
    return {"arena": {setting: arena}, "minilm-frozen": {setting: frozen}, "minilm-lora": {setting: lora}}


def _chain(build: str, *settings: Mapping[str, Mapping[str, Any]], worlds: tuple[str, ...] | None = None) -> Row:
    merged = {place: {k: v for one in settings for k, v in one.get(place, {}).items()} for place in ("*", *PLACES)}
    return Row(build, "chains", merged, worlds=worlds)


TWO, FIVE = {"replay.capacity": "2%"}, {"replay.capacity": "5%"}
EWC = _by_world("ewc.strength", 600.0, 10.0, 1e3)
SI = _by_world("si.strength", 3e3, 10.0, 100.0)
MAS = _by_world("mas.strength", 1.5e-4, 0.1, 0.03)
LWF = _by_world("lwf.strength", 0.03, 30.0, 3.0)
DER = _by_world("derpp.alpha", 0.001, 1.0, 0.1)
POWERS = [0.1, 1.0, 10.0, 100.0, 1e3, 1e4]

# One row a strategy. Strengths have no scale of their own: they come from `--tune`, world by world.
TABLE: dict[str, Row] = {
    "naive": Row("naive", "baseline", worlds=(*PLACES, *ASKED)),
    "joint": Row("joint", "baseline", worlds=(*PLACES, *ASKED)),
    "isolated": Row("isolated", "baseline"),
    "replay-2%": Row("replay", "rehearsal", {"*": TWO}),
    "replay-5%": Row("replay", "rehearsal", {"*": FIVE}),
    "replay-balanced": Row("replay", "rehearsal", {"*": {**FIVE, "replay.memory": "balanced"}}),
    "replay-ring": Row(
        "replay", "rehearsal", {"*": {**FIVE, "replay.memory": "ring"}}, worlds=("arena", "minilm-frozen")
    ),
    "replay-class-balanced": Row(
        "replay", "rehearsal", {"*": {**FIVE, "replay.memory": "class-balanced"}}, worlds=("minilm-frozen",)
    ),
    "derpp-2%": Row(
        "derpp",
        "rehearsal",
        {"*": {"derpp.capacity": "2%", "derpp.beta": 1.0}, **DER},
        {
            "*": {"derpp.alpha": [0.1, 0.3, 1.0, 3.0, 10.0]},
            "arena": {"derpp.alpha": [0.001, 0.003, 0.01, 0.05, 0.2]},
        },
    ),
    "derpp-2%-classes": Row(
        "derpp",
        "rehearsal",
        {"*": {"derpp.capacity": "2%", "derpp.beta": 1.0, "derpp.memory": "class-balanced"}, **DER},
        worlds=("minilm-frozen",),
    ),
    "derpp-5%": Row(
        "derpp",
        "rehearsal",
        {"*": {"derpp.capacity": "5%", "derpp.beta": 1.0}, **DER},
    ),
    # Each step goes through all that GEM holds: with 5 % of the arena's rows it would take six times naive's time.
    "gem-2%": Row("gem", "gradients", {"*": {"gem.per_task": "2%"}}, {"*": {"gem.margin": [0.0, 0.5]}}),
    "agem-5%": Row("agem", "gradients", {"*": {"agem.per_task": "5%", "agem.sample": 16}}),
    "ewc": Row(
        "ewc",
        "weights",
        EWC,
        {
            "minilm-frozen": {"ewc.strength": POWERS},
            "minilm-lora": {"ewc.strength": [30.0, 300.0, 1e3, 3e3, 3e4]},
            "arena": {"ewc.strength": [100.0, 300.0, 600.0, 800.0]},
        },
    ),
    "ewc-online": Row(
        "ewc",
        "weights",
        {"*": {"ewc.decay": 0.5}, **_by_world("ewc.strength", 1e3, 1e3, 1e3)},
        {
            "minilm-frozen": {"ewc.strength": [10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4]},
            "minilm-lora": {"ewc.strength": [300.0, 1e3, 3e3, 1e4]},
            "arena": {"ewc.strength": [600.0, 1e3, 2e3]},
        },
    ),
    "ewc-weight": Row(
        "ewc",
        "weights",
        {"*": {"ewc.space": "weight"}, "minilm-lora": {"ewc.strength": 2e3}},
        {"*": {"ewc.strength": [30.0, 300.0, 2e3, 3e3, 3e4]}},
        worlds=("minilm-lora",),
    ),
    "si": Row(
        "si",
        "weights",
        SI,
        {
            "minilm-frozen": {"si.strength": [1.0, 3.0, 10.0, 30.0, 100.0]},
            "minilm-lora": {"si.strength": [10.0, 100.0, 1e3, 1e4]},
            "arena": {"si.strength": [1e3, 2e3, 3e3, 4e3, 5e3]},
        },
    ),
    "mas": Row(
        "mas",
        "weights",
        MAS,
        {
            "minilm-frozen": {"mas.strength": [0.01, 0.03, 0.05, 0.1, 0.3]},
            "minilm-lora": {"mas.strength": [0.01, 0.03, 0.1, 0.3, 3.0]},
            "arena": {"mas.strength": [5e-5, 1e-4, 1.5e-4, 2e-4, 3e-4]},
        },
    ),
    "lwf": Row(
        "lwf",
        "outputs",
        LWF,
        {
            "*": {"lwf.strength": [1.0, 3.0, 10.0, 30.0, 100.0]},
            "arena": {"lwf.strength": [0.01, 0.03, 0.1, 0.3, 1.0]},
        },
    ),
    "freeze-bottom": Row("freeze-bottom", "freezing", worlds=("arena", "minilm-lora")),
    # The two with a part for each task are scored twice: told the task, and with the task inferred.
    "packnet": Row(
        "packnet", "parts", {"arena": {"packnet.prune_to": "start"}, "minilm-lora": {"packnet.prune_to": "start"}}
    ),
    "pnn": Row("pnn", "parts", worlds=(*MINILM, *ASKED)),
    "olora": Row(
        "olora",
        "subspaces",
        {"*": {"olora.strength": 0.5}},
        {"*": {"olora.strength": [0.02, 0.5, 1.5, 5.0]}},
        worlds=("minilm-lora", *ASKED),
    ),
    "osf": Row(
        "osf", "subspaces", {}, {"*": {"osf.effective_rank": [0.5, 0.6, 0.7]}}, worlds=("arena", "minilm-frozen")
    ),
    "ema": Row("ema", "merging", {"*": {"ema.decay": 0.3}}, {"*": {"ema.decay": [0.2, 0.3, 0.5]}}),
    "magmax": Row("magmax", "merging"),
    "ties": Row("ties", "merging"),
    "slao": Row("slao", "merging", worlds=("minilm-lora", *ASKED)),
    "prompt-pool": Row(
        "prompt-pool",
        "prompts",
        {"*": {"prompt-pool.deep": True}},
        worlds=("arena",),
        training={"arena": {"optimizer.lr": 0.3}},
    ),
    # Chains take the strengths of their members.
    "replay-5%+ewc": _chain("replay+ewc", {"*": FIVE}, EWC),
    "replay-5%+lwf": _chain("replay+lwf", {"*": FIVE}, LWF, worlds=("minilm-frozen",)),
    "freeze-bottom+si": _chain("freeze-bottom+si", SI, worlds=("arena",)),
    "si+ema": _chain("si+ema", SI, {"*": {"ema.decay": 0.05}}, worlds=("arena",)),
    "lwf+si": _chain("lwf+si", LWF, SI, worlds=("minilm-frozen",)),
    "lwf+mas": _chain("lwf+mas", LWF, MAS, worlds=("minilm-frozen",)),
}
FAMILIES = (
    "baseline", "rehearsal", "weights", "gradients", "outputs", "freezing", "parts", "subspaces", "merging",
    "prompts", "chains",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """What is learnt, and how.

    Attributes:
        name: of the world.
        kind: "arena", "features" or "tokens".
        tasks: the tasks of the first order, by name.
        train_rows: of a task.
        evaluation_rows: of a task.
        epochs: passes over a task's rows.
        training: settings of the loop; for the arena what differs from the recipe, flat.
    """

    name: str
    kind: str
    tasks: tuple[str, ...]
    train_rows: int
    evaluation_rows: int
    epochs: int
    training: Mapping[str, Any]

    def order(self, seed: int) -> list[str]:
        """The tasks in a seed's order; reversed on the tuning seed. The arena's seeds change the rows instead."""
        if self.kind == "arena":
            return list(self.tasks)
        if seed == TUNING_SEED:
            return list(reversed(self.tasks))
        return [self.tasks[i % len(self.tasks)] for i in ORDERS[seed % len(ORDERS)][: len(self.tasks)]]


# Each task is early in one order and late in another, and the two reviews with their shared labels are neighbours
# in one order only.
ORDERS = ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (3, 0, 4, 1, 2))
WORLDS: dict[str, World] = {
    "arena": World("arena", "arena", ("comparison", "sequence", "causal", "math", "grid"), 800, 100, 1, {}),
    "arena-lora": World(
        "arena-lora", "arena", ("comparison", "sequence", "causal", "math", "grid"), 800, 100, 1,
        {"tuning": "lora", "lora.r": 16, "lora.alpha": 32, "optimizer.lr": 3e-3},
    ),
    "minilm-frozen": World(
        "minilm-frozen", "features", encoder.TASKS, 500, 300, 8,
        {"optimizer": {"type": "adamw", "lr": 1e-3}, "batch_size": 20, "evaluation_batch_size": 300},
    ),
    "minilm-lora": World(
        "minilm-lora", "tokens", encoder.TASKS, 160, 100, 3,
        {"optimizer": {"type": "adamw", "lr": 2e-3}, "batch_size": 16, "clip": 1.0, "evaluation_batch_size": 50,
         "precision": "bf16"},
    ),
}  # fmt: skip


def runs(name: str, world: World) -> bool:
    """Whether a strategy of the table runs in a world."""
    places = TABLE[name].worlds
    return world.name not in ASKED if places is None else world.name in places
