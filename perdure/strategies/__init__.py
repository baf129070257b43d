"""How not to forget: one method a file."""

from perdure.strategies.agem import AGEM, project_agem
from perdure.strategies.base import Strategy
from perdure.strategies.build import STRATEGIES, build
from perdure.strategies.chain import Chain
from perdure.strategies.derpp import DERpp
from perdure.strategies.ewc import EWC
from perdure.strategies.freeze import FreezeBottom
from perdure.strategies.gem import GEM, project_gem
from perdure.strategies.lwf import LwF, distillation
from perdure.strategies.mas import MAS
from perdure.strategies.naive import Naive
from perdure.strategies.replay import Replay
from perdure.strategies.si import SI

__all__ = [
    "AGEM",
    "EWC",
    "GEM",
    "MAS",
    "SI",
    "STRATEGIES",
    "Chain",
    "DERpp",
    "FreezeBottom",
    "LwF",
    "Naive",
    "Replay",
    "Strategy",
    "build",
    "distillation",
    "project_agem",
    "project_gem",
]
