"""How a model does on each task of a stream, and what that says about forgetting."""

from perdure.evaluation import metrics
from perdure.evaluation.matrix import ScoreMatrix

__all__ = ["ScoreMatrix", "metrics"]
