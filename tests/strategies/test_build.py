"""Strategies from names and settings, and chains of them."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.errors import ConfigError, StrategyError
from perdure.strategies import EWC, Chain, Naive, Replay, Strategy, build
from perdure.strategies.build import describe, enabled


def test_names_and_settings() -> None:
    assert isinstance(build("naive"), Naive)
    ewc = build("ewc", {"ewc": {"enabled": True, "lambda": 7, "decay": 0.5}})
    assert isinstance(ewc, EWC)
    assert (ewc.strength, ewc.decay) == (7.0, 0.5)


def test_plus_makes_a_chain_in_order() -> None:
    chain = build("replay+ewc", {"replay": {"capacity": 3}})
    assert isinstance(chain, Chain)
    assert [type(member) for member in chain.strategies] == [Replay, EWC]


def test_unknown_names_list_what_exists() -> None:
    with pytest.raises(
        ConfigError,
        match=r"unknown strategy 'ewcc'. Did you mean 'ewc'\? Known: agem, derpp, ema, ewc, freeze-bottom, gem",
    ):
        build("ewcc")
    with pytest.raises(ConfigError, match=r"unknown setting of ewc 'strenght'\. Did you mean 'strength'"):
        build("ewc", {"ewc": {"strenght": 1}})


def test_all_mistakes_come_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)ewc.strength.*ewc.samples"):
        build("ewc", {"ewc": {"strength": "much", "samples": "few"}})


def test_enabled_leaves_out_what_is_switched_off() -> None:
    assert enabled({"ewc": {"enabled": False}, "replay": {}}) == ["replay"]


def test_a_chain_refuses_twins_and_two_owners() -> None:
    class Own(Strategy):
        name = "own"

        def forward(self, model: Any, batch: Any) -> Any:
            return super().forward(model, batch)

    class Other(Own):
        name = "other"

    with pytest.raises(StrategyError, match="ewc stands in it more than once"):
        Chain([EWC(), EWC()])
    with pytest.raises(StrategyError, match="own and other both decide on forward"):
        Chain([Own(), Other()])
    with pytest.raises(StrategyError, match="at least one"):
        Chain([])


def test_a_description_builds_the_same() -> None:
    chain = Chain([Replay(capacity=3, ratio=0.5), EWC(strength=2.0, samples=4)])
    described = describe(chain)
    assert described is not None
    assert describe(build(list(described), described)) == described

    class Own(Naive):
        pass

    assert describe(Own()) is None
