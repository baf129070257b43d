"""Teaching a language model one correction at a time."""

from perdure.teaching.lesson import Lesson, Matter
from perdure.teaching.settings import TeachSettings
from perdure.teaching.teacher import Teacher

__all__ = ["Lesson", "Matter", "TeachSettings", "Teacher"]
