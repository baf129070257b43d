"""Plain fine-tuning on one task after another: the baseline that forgets."""

from typing import ClassVar

from perdure.strategies.base import Strategy


class Naive(Strategy):
    """Do nothing against forgetting."""

    name: ClassVar[str] = "naive"
    summary: ClassVar[str] = "plain sequential fine-tuning; the baseline that shows the forgetting"
