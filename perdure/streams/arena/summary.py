"""Summary: a short report of a day with one piece of news and details; the summary is one sentence.

What counts is what happened on the day of the report: other events in it are said to be of another time.
"""

from __future__ import annotations

import random

from perdure.streams.arena.kind import TOWNS, Facts, Kind, words

DAYS = words("Monday,Tuesday,Wednesday,Thursday,Friday,Saturday,Sunday")
NEWS = words(
    "the bridge fell down,the dam broke,the new school opened,the mill burned down,the bank closed,"
    "the ship came home,the old tower fell,the road was opened,the team won the cup,the river left its bed,"
    "the train left the rails,the king came to visit,the shop was robbed,the market moved,the mine closed,"
    "the mayor stepped down"
)
DETAILS = words(
    "The sky was grey.,It was a windy day.,There was soup for lunch.,A dog slept by the gate.,"
    "Two men played cards.,The bells rang at noon.,Many people wore hats.,The bread was fresh.,"
    "Children sang in the street.,The clock was late.,Birds sat on the roof.,Tea was served at four."
)
LONG_AGO = words("Last year,Long ago,Ten years ago,Last winter")
# How many details there are, and how many events of another time.
_SIZES = {1: (1, 0), 2: (3, 0), 3: (3, 1), 4: (4, 2), 5: (6, 3)}


def news_of(facts: Facts) -> list[str]:
    """All events that are told of the day of the report: one, or the report would be ambiguous."""
    return [event for when, event in facts["events"] if when == f"On {facts['day']}"]


def _draw(rng: random.Random, level: int) -> Facts:
    details, older = _SIZES[level]
    day, *other_days = rng.sample(DAYS, 3)
    events = rng.sample(NEWS, 1 + older)
    when = [f"On {day}", *rng.sample(LONG_AGO, max(older - 1, 1)), f"On {other_days[0]}"][: 1 + older]
    told = [[w, event] for w, event in zip(when, events, strict=True)]
    sentences = [*range(len(told)), *rng.sample(range(-len(DETAILS), 0), details)]
    if level > 1:
        rng.shuffle(sentences)
    facts = {
        "place": rng.choice(TOWNS),
        "day": day,
        "events": told,
        "order": sentences,
        "answer": events[0],
    }
    if news_of(facts) != [events[0]]:
        raise AssertionError(f"a report has not exactly one piece of news of its day: {facts}")
    return facts


def _sentences(facts: Facts) -> list[str]:
    """Details have negative numbers, events those of `events`."""
    return [DETAILS[n] if n < 0 else "{} {}.".format(*facts["events"][n]) for n in facts["order"]]


SUMMARY = Kind(
    name="summary",
    draw=_draw,
    told=lambda facts: {"report": f"Report of {facts['day']} from {facts['place']}. {' '.join(_sentences(facts))}"},
    prompts=(
        "Sum up. {report} The news of the day:",
        "Say it in one line. {report} In short:",
        "{report} Sum up the news of the day:",
        "Read the report. {report} Its news in one line:",
        "Make it short. {report} What happened that day?",
        "Tell the main thing. {report} The day in short:",
        "One line, please. {report} The news of that day:",
        "A long report. {report} A short one:",
        "Keep what counts. {report} The day's news:",
        "Leave out what does not count. {report} The news that day:",
        "What is new? {report} Give it in one line:",
        "Find the news. {report} Now say it in short:",
    ),
    answer=lambda facts: f" in short, {facts['answer']} in {facts['place']}.",
    candidates=lambda facts: NEWS,
    canonical=lambda facts: " ".join([facts["place"], facts["day"], *sorted(_sentences(facts))]),
    several=True,
)
