"""Weights and batches over a mesh of devices: rows over its axis `data`, matrices over its axis `model`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from perdure.errors import ConfigError
from perdure.jax.tree import map_named

Tree = TypeVar("Tree")
AXES = ("data", "model")
# Which dimension of a layer's matrix is spread over `model`: outputs of what comes first in a block, inputs of what
# comes last, so that a block needs one sum over devices.
FIRST, LAST = ("query", "key", "value", "gate", "up"), ("output", "down")


def make_mesh(data: int, model: int = 1) -> Mesh:
    """A mesh over the first data · model devices.

    Raises:
        ConfigError: there are fewer.
    """
    there = len(jax.devices())
    if data < 1 or model < 1 or data * model > there:
        raise ConfigError(f"a mesh of {data} × {model} (data × model) needs as many devices; there are {there}")
    return jax.make_mesh((data, model), AXES, (AxisType.Auto,) * 2, devices=jax.devices()[: data * model])


def sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where a weight lies by its name (also that of an optimizer's state for it); on all devices if none fits."""
    spec: list[str | None] = [None] * len(shape)
    if ".layers." in f".{name}" and len(shape) == 3:
        parts = name.split(".")
        layer = next((part for part in parts if part in FIRST + LAST), None)
        if layer in FIRST and parts[-1] in ("weight", "b"):
            spec[1] = "model"
        elif layer in LAST and parts[-1] in ("weight", "a"):
            spec[2] = "model"
    elif name.split(".")[-1] == "embed" and len(shape) == 2:
        spec[1] = "model"
    fits = all(axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(spec, shape, strict=True))
    return NamedSharding(mesh, PartitionSpec(*spec) if fits else PartitionSpec())


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    """Where each leaf of a tree lies."""
    return map_named(lambda name, leaf: sharding(name, leaf.shape, mesh), tree)


def placing(mesh: Mesh) -> Callable[[str, np.ndarray], Array]:
    """For `load(place=…)`: puts each tensor where it lies as it is read."""
    return lambda name, values: jax.device_put(values, sharding(name, values.shape, mesh))


def spread(batch: Any, mesh: Mesh) -> Any:
    """A batch with its rows over the axis `data`."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
