"""The columns of a progressive network: each has its own copy of what is trained, and hears the older ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from perdure.models import objectives
from perdure.models.modes import looking
from perdure.strategies.freeze import stack
from perdure.types import Batch, Output

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS)
# Hidden states of one forward pass: of each site, one for each time that it was called.
Hidden = Mapping[str, list[Tensor]]
# A parameter's name has no dot; and PEFT saves whatever has "lora_" in its name with the first column's adapter.
_PLAIN = str.maketrans("._", "/~")


class Columns(nn.Module):
    """All columns but the first, which is the model itself. A child of the model, so that it is trained and saved.

    Args:
        names: parameters and buffers that each column has for itself; all others are common.
        sites: modules at which a column hears the older ones.
        width: of the hidden states where sites are blocks; 0 where they are linear and convolution layers.
    """

    def __init__(self, names: Sequence[str], sites: Sequence[str], width: int) -> None:
        super().__init__()
        self.names, self.sites, self.width = tuple(names), tuple(sites), width
        self.parts = ("down", "up") if width else ("weight",)

    def __len__(self) -> int:
        return 1 + len(self._modules)

    def forward(self, x: Any) -> Any:
        """The input: an `nn.Sequential` calls every child that it has."""
        return x

    def cut(self, count: int) -> None:
        """Leave so many columns: a task whose training failed may be begun again."""
        for column in range(count, len(self)):
            self._modules.pop(str(column))

    def grow(self, model: nn.Module, base: Mapping[str, Tensor], rank: int, rng: torch.Generator) -> None:
        """Freeze the columns that there are, and add one that computes just what the base did."""
        self.freeze(model)
        own, heard = nn.Module(), nn.Module()
        for name, value in self.values(model, 0).items():
            start = self.start(model, base, name).to(value, copy=True)
            if isinstance(value, nn.Parameter):
                own.register_parameter(_plain(name), nn.Parameter(start))
            else:
                own.register_buffer(_plain(name), start)
        like = next(own.parameters())
        for older in range(len(self)):
            for site in self.sites:
                for part, zero in zip(self.parts, self.unheard(model, site, rank, rng), strict=True):
                    heard.register_parameter(f"{older}/{_plain(site)}/{part}", nn.Parameter(zero.to(like)))
        self.add_module(str(len(self)), nn.ModuleDict({"own": own, "heard": heard}))

    def freeze(self, model: nn.Module) -> None:
        """No column that there is now is trained any more."""
        for value in self.values(model, 0).values():
            value.requires_grad_(False)
        self.requires_grad_(False)

    def start(self, model: nn.Module, base: Mapping[str, Tensor], name: str) -> Tensor:
        """What a new column starts from."""
        return base[name]

    def unheard(self, model: nn.Module, site: str, rank: int, rng: torch.Generator) -> list[Tensor]:
        """The tensors of a lateral connection that adds nothing yet."""
        if self.width:
            down = torch.empty(rank, self.width).normal_(std=self.width**-0.5, generator=rng)
            return [down, torch.zeros(self.width, rank)]
        weight = model.get_submodule(site).weight
        assert isinstance(weight, Tensor)
        return [torch.zeros_like(weight, requires_grad=False)]

    def lateral(self, column: int, older: int, site: str) -> list[Tensor]:
        """The tensors of the connection into a column from an older one."""
        held = self.get_submodule(f"{column}.heard")
        return [getattr(held, f"{older}/{_plain(site)}/{part}") for part in self.parts]

    def hear(self, layer: nn.Module, tensors: Sequence[Tensor], hidden: Tensor) -> Tensor:
        """What a connection adds to a layer's output, given the older column's hidden state there."""
        if self.width:
            down, up = tensors
            return F.linear(F.linear(F.rms_norm(hidden, (self.width,)), down).relu(), up)
        if isinstance(layer, CONVOLUTIONS):
            return layer._conv_forward(hidden, tensors[0], None)
        return F.linear(hidden, tensors[0])

    def values(self, model: nn.Module, column: int) -> dict[str, Tensor]:
        """A column's own parameters and buffers, by the names that they have in the model."""
        if column:
            held = self.get_submodule(f"{column}.own")
            return {name: getattr(held, _plain(name)) for name in self.names}
        own: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: own[name] for name in self.names}

    def run(self, model: nn.Module, batch: Batch, column: int) -> Output:
        """The output of a column. The older ones run first, as they were when their tasks ended."""
        hidden: list[Hidden] = []
        with self.aside(model):
            for older in range(column):
                with self.listening(model, older, hidden) as states:
                    self.call(model, batch, older)
                hidden.append(states)
        with self.listening(model, column, hidden):
            return self.call(model, batch, column)

    def call(self, model: nn.Module, batch: Batch, column: int) -> Output:
        """The model's forward pass with a column's values in it."""
        if not column:
            return objectives.forward(model, batch)
        values = {f"model.{name}": value for name, value in self.values(model, column).items()}
        return Output(functional_call(_Bound(model), values, (batch,)))

    @contextmanager
    def aside(self, model: nn.Module) -> Iterator[None]:
        """Without gradients, and in eval mode: no dropout, and no running statistics that move."""
        with looking(model):
            yield

    @contextmanager
    def listening(self, model: nn.Module, column: int, hidden: Sequence[Hidden]) -> Iterator[Hidden]:
        """While a column runs, it hears the older ones, and its own hidden states are gathered."""
        states: dict[str, list[Tensor]] = {site: [] for site in self.sites}

        def hook(site: str, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            call = len(states[site])
            result: Tensor = output if isinstance(output, Tensor) else output[0]
            for older, said in enumerate(hidden):
                if call < len(said[site]):
                    added = self.hear(layer, self.lateral(column, older, site), said[site][call])
                    result = result + added.to(result.dtype)
            states[site].append(result if self.width else next(iter((*args, *kwargs.values()))))
            return result if isinstance(output, Tensor) else (result, *output[1:])

        hooks = [
            model.get_submodule(site).register_forward_hook(partial(hook, site), with_kwargs=True)
            for site in self.sites
        ]
        try:
            yield states
        finally:
            for handle in hooks:
                handle.remove()

    def named_tensors(self, model: nn.Module, column: int) -> dict[str, Tensor]:
        """All of a column: "own.NAME" as the model calls it, and "heard.OLDER.SITE.PART" for each lateral."""
        found = {f"own.{name}": value for name, value in self.values(model, column).items()}
        for older, site in product(range(column), self.sites):
            for part, value in zip(self.parts, self.lateral(column, older, site), strict=True):
                found[f"heard.{older}.{site}.{part}"] = value
        return found


def find_sites(model: nn.Module, names: Sequence[str]) -> tuple[list[str], int]:
    """Where columns hear older ones: names of modules, and the width of hidden states if these are blocks.

    Of a language model that is every block. Else every trained linear and convolution layer but the first in order
    of definition, embeddings counted: it is taken to see the input itself, which is the same in all columns.
    """
    if objectives.is_language_model(model):
        blocks, config = set(stack(model)), model.config
        assert not isinstance(config, Tensor | nn.Module)
        return [name for name, m in model.named_modules() if m in blocks], config.get_text_config().hidden_size
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (*LAYERS, nn.Embedding, nn.EmbeddingBag))]
    hearing = [name for name, m in layers[1:] if isinstance(m, LAYERS)]
    return [site for site in hearing if any(name.startswith(f"{site}.") for name in names)], 0


class _Bound(nn.Module):
    """A model's forward pass as a module for `functional_call`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return objectives.forward(self.model, batch).logits


def _plain(name: str) -> str:
    return name.translate(_PLAIN)
