"""How not to forget: one method a file."""

from perdure.strategies.base import Strategy
from perdure.strategies.build import STRATEGIES, build
from perdure.strategies.chain import Chain
from perdure.strategies.ewc import EWC
from perdure.strategies.mas import MAS
from perdure.strategies.naive import Naive
from perdure.strategies.replay import Replay
from perdure.strategies.si import SI

__all__ = ["EWC", "MAS", "SI", "STRATEGIES", "Chain", "Naive", "Replay", "Strategy", "build"]
