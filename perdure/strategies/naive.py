"""Plain fine-tuning on one task after another: the baseline that forgets."""

from typing import ClassVar

from perdure.strategies.base import Strategy


class Naive(Strategy):
    """Do nothing against forgetting."""

    name: ClassVar[str] = "naive"
    summary: ClassVar[str] = "plain sequential fine-tuning; the baseline that shows the forgetting"
    needs: ClassVar[str] = "nothing"
    cost: ClassVar[str] = "none"
    source: ClassVar[str] = "McCloskey & Cohen 1989 (doi:10.1016/S0079-7421(08)60536-8)"
