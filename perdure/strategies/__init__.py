"""How not to forget: one method a file."""

from perdure.strategies.agem import AGEM, project_agem
from perdure.strategies.base import Strategy
from perdure.strategies.build import STRATEGIES, build
from perdure.strategies.chain import Chain
from perdure.strategies.derpp import DERpp
from perdure.strategies.ema import EMA
from perdure.strategies.ewc import EWC
from perdure.strategies.freeze import FreezeBottom
from perdure.strategies.gem import GEM, project_gem
from perdure.strategies.lwf import LwF, distillation
from perdure.strategies.magmax import MagMax
from perdure.strategies.mas import MAS
from perdure.strategies.multi_lora import MultiLoRA
from perdure.strategies.naive import Naive
from perdure.strategies.olora import OLoRA
from perdure.strategies.osf import OSF
from perdure.strategies.packnet import PackNet
from perdure.strategies.pnn import PNN
from perdure.strategies.prompt_pool import PromptPool
from perdure.strategies.replay import Replay
from perdure.strategies.si import SI
from perdure.strategies.slao import SLAO
from perdure.strategies.ties import TIES

__all__ = [
    "AGEM",
    "EMA",
    "EWC",
    "GEM",
    "MAS",
    "OSF",
    "PNN",
    "SI",
    "SLAO",
    "STRATEGIES",
    "TIES",
    "Chain",
    "DERpp",
    "FreezeBottom",
    "LwF",
    "MagMax",
    "MultiLoRA",
    "Naive",
    "OLoRA",
    "PackNet",
    "PromptPool",
    "Replay",
    "Strategy",
    "build",
    "distillation",
    "project_agem",
    "project_gem",
]
