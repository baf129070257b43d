"""Weights and rows over four devices: the same losses as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from perdure.errors import ConfigError
from perdure.jax.shard import make_mesh, sharding

PROGRAM = """
import json, sys
import jax
from perdure.jax import MHAR, FitSettings, Learner, Regressor, Row, RowTask, add_lora, load, train
from perdure.jax.shard import make_mesh, placing
from perdure.jax.tree import named

folder, rows = sys.argv[1], json.loads(sys.argv[2])
tasks = [RowTask(n, tuple(Row(f"r{i}", tuple(x), y, n) for i, (x, y) in enumerate(r))) for n, r in rows]
found = {}
for data, model in json.loads(sys.argv[3]):
    mesh = make_mesh(data, model)
    base = add_lora(load(folder, place=placing(mesh)), jax.random.key(1), r=4, alpha=8)
    settings = FitSettings(
        strategy="replay", gradient="separate", batch_size=4, ratio=1, length=8, lr=1e-2, memory=5, seed=3
    )
    learner = Learner(Regressor(base, MHAR(32, jax.random.key(2), hidden=24)), settings, mesh)
    losses = [result.loss for _, result in train(learner, tasks)]
    where = {n: str(leaf.sharding.spec) for n, leaf in named((learner.state, learner._frozen)).items()}
    split = [n for n, spec in where.items() if "model" in spec]
    found[f"{data}x{model}"] = [losses, len(split), learner.compilations["step"]]
print(json.dumps(found))
"""


def test_four_devices_give_the_losses_of_one(ported: Path, make_learner: Any, make_tasks: Any) -> None:
    from perdure.jax import train

    tasks = make_tasks(2)
    rows = json.dumps([(task.name, [(row.ids, row.y) for row in task.rows]) for task in tasks])
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    shown = subprocess.run(
        [sys.executable, "-c", PROGRAM, ported, rows, "[[2, 2]]"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(shown.stdout)
    learner = make_learner(strategy="replay", gradient="separate", tuning="lora", ratio=1, epochs=1)
    one = [result.loss for _, result in train(learner, tasks)]
    assert len(one) == 4
    for losses, split, compiled in found.values():
        np.testing.assert_allclose(losses, one, atol=1e-5)
        assert compiled == 1
        assert split > 14


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("backbone.layers.attention.query.weight", (2, 8, 4), (None, "model", None)),
        ("trained.backbone.layers.mlp.down.a", (2, 4, 8), (None, None, "model")),
        ("optimizer.1.mu.backbone.layers.mlp.up.b", (2, 8, 4), (None, "model", None)),
        ("layers.mlp.up.a", (2, 4, 8), (None, None, None)),
        ("layers.mlp.down.base.weight", (2, 4, 8), (None, None, "model")),
        ("embed", (10, 4), (None, "model")),
        ("head.query.weight", (4, 4), ()),
        ("layers.mlp.up.weight", (2, 7, 4), ()),
    ],
)
def test_where_a_weight_lies(name: str, shape: tuple[int, ...], wanted: Any) -> None:
    """On a mesh of two devices; what does not divide, and the head, lies on all."""
    mesh = jax.sharding.AbstractMesh((1, 2), ("data", "model"))
    spec = tuple(sharding(name, shape, mesh).spec)  # type: ignore[arg-type]
    assert [axis for axis in spec if axis] == [axis for axis in wanted if axis]
    assert spec == wanted or not any(wanted)


def test_too_few_devices() -> None:
    with pytest.raises(ConfigError, match="needs as many devices; there are"):
        make_mesh(64, 2)
