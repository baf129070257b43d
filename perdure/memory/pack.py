"""Examples as a few tensors and plain values, so that a memory can be saved without pickle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perdure.types import Example, Segment


def pack(examples: Sequence[Example]) -> dict[str, Any]:
    """The examples as tensors and plain values; ragged tensors are laid end to end."""
    tensors: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    loose: dict[str, list[Tensor]] = {}

    def store(name: str, value: Tensor) -> dict[str, Any]:
        dtype = str(value.dtype).removeprefix("torch.")
        column = f"{name}.{dtype}"
        loose.setdefault(column, []).append(value.detach().cpu().reshape(-1))
        return {"column": column, "shape": list(value.shape)}

    for example in examples:
        row: dict[str, Any] = {
            "key": example.key,
            "task": example.task,
            "source": example.source,
            "group": example.group,
            "segments": [[s.text, s.learn, s.cut, s.special] for s in example.segments],
            "fields": dict(example.fields),
            "extras": {},
        }
        for name in ("x", "y"):
            value = getattr(example, name)
            if value is not None:
                row[name] = store(name, value)
        for name, value in example.extras.items():
            row["extras"][name] = (
                {"tensor": store(f"extras/{name}", value)} if isinstance(value, Tensor) else {"value": value}
            )
        rows.append(row)
    for column, values in loose.items():
        tensors[column] = torch.cat(values)
    return {"rows": rows, "tensors": tensors}


def unpack(packed: Mapping[str, Any]) -> list[Example]:
    """The examples that `pack` was given."""
    positions: dict[str, int] = {}
    tensors: Mapping[str, Tensor] = packed["tensors"]

    def fetch(place: Mapping[str, Any]) -> Tensor:
        column, shape = place["column"], place["shape"]
        start = positions.get(column, 0)
        size = 1
        for side in shape:
            size *= side
        positions[column] = start + size
        return tensors[column][start : start + size].reshape(shape).clone()

    examples = []
    for row in packed["rows"]:
        x = fetch(row["x"]) if "x" in row else None
        y = fetch(row["y"]) if "y" in row else None
        extras = {
            name: fetch(entry["tensor"]) if "tensor" in entry else entry["value"]
            for name, entry in row["extras"].items()
        }
        examples.append(
            Example(
                key=row["key"],
                task=row["task"],
                segments=tuple(Segment(*parts) for parts in row["segments"]),
                x=x,
                y=y,
                source=row["source"],
                group=row["group"],
                extras=extras,
                fields=row["fields"],
            )
        )
    return examples
