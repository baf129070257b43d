"""The reasoning arena: kinds of small generated problems whose answers are computed, never typed in."""

from perdure.streams.arena.causal import EVENTS, causal_premises
from perdure.streams.arena.comparison import SCALES, comparison_premises, superlative
from perdure.streams.arena.generate import check_disjoint, draw, generate, split
from perdure.streams.arena.grid import grid_premises, solutions
from perdure.streams.arena.item import ASK, Item, digest, normalise, partition, plain, plain_wording, short, wording
from perdure.streams.arena.judge import scores, stated, strict
from perdure.streams.arena.kind import NAMES, THINGS, Facts, Kind, words
from perdure.streams.arena.kinds import (
    ALL_FORMS,
    ALL_KINDS,
    ALL_LEVELS,
    DISPLAY_NAMES,
    FORMS,
    IN_PRETRAINING,
    KIND_BY_NAME,
    KINDS,
    LEVELS,
    check_levels,
    count_forms,
)
from perdure.streams.arena.math import OBJECTS, math_sentences
from perdure.streams.arena.rouge import rouge_l
from perdure.streams.arena.sequence import continuations, sequence_terms

__all__ = [
    "ALL_FORMS",
    "ALL_KINDS",
    "ALL_LEVELS",
    "ASK",
    "DISPLAY_NAMES",
    "EVENTS",
    "FORMS",
    "IN_PRETRAINING",
    "KINDS",
    "KIND_BY_NAME",
    "LEVELS",
    "NAMES",
    "OBJECTS",
    "SCALES",
    "THINGS",
    "Facts",
    "Item",
    "Kind",
    "causal_premises",
    "check_disjoint",
    "check_levels",
    "comparison_premises",
    "continuations",
    "count_forms",
    "digest",
    "draw",
    "generate",
    "grid_premises",
    "math_sentences",
    "normalise",
    "partition",
    "plain",
    "plain_wording",
    "rouge_l",
    "scores",
    "sequence_terms",
    "short",
    "solutions",
    "split",
    "stated",
    "strict",
    "superlative",
    "wording",
    "words",
]
