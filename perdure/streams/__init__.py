"""What arrives, in order: tasks from text, from any data source, or generated."""

from perdure.streams.answers import RULES, Rule
from perdure.streams.encode import Encoder
from perdure.streams.hotpot import PREPARATIONS
from perdure.streams.languages import Language, Languages
from perdure.streams.sources import Limits, Row, Rows, read_rows
from perdure.streams.spec import ArenaSpec, StreamSpec, TaskSpec, TemplateSpec, build, build_task
from perdure.streams.stream import Stream, disjoint, text_of
from perdure.streams.text import Template, to_examples

__all__ = [
    "PREPARATIONS",
    "RULES",
    "ArenaSpec",
    "Encoder",
    "Language",
    "Languages",
    "Limits",
    "Row",
    "Rows",
    "Rule",
    "Stream",
    "StreamSpec",
    "TaskSpec",
    "Template",
    "TemplateSpec",
    "build",
    "build_task",
    "disjoint",
    "read_rows",
    "text_of",
    "to_examples",
]
