"""Reactions with yields, as plain values: tables read, cut into tasks, split, put in order and augmented.

Knows neither tokenizers nor models.
"""

from perdure.streams.reactions.chem import augment, canonical, has_rdkit, normal
from perdure.streams.reactions.names import PUBLISHED_COLUMNS, published_smiles
from perdure.streams.reactions.reaction import Reaction, ReactionTask, Table
from perdure.streams.reactions.similarity import arrange_tasks, similarities
from perdure.streams.reactions.spec import ReactionsSpec
from perdure.streams.reactions.table import TOLERANCE, read
from perdure.streams.reactions.tasks import augmented, build, disjoint, split, tasks_of

__all__ = [
    "PUBLISHED_COLUMNS",
    "TOLERANCE",
    "Reaction",
    "ReactionTask",
    "ReactionsSpec",
    "Table",
    "arrange_tasks",
    "augment",
    "augmented",
    "build",
    "canonical",
    "disjoint",
    "has_rdkit",
    "normal",
    "published_smiles",
    "read",
    "similarities",
    "split",
    "tasks_of",
]
