"""Causal: rules "when A, B" in any order, one event that starts the chain, the last event asked for."""

from __future__ import annotations

import random
from itertools import pairwise

from perdure.streams.arena.kind import Facts, Kind, capital, words

EVENTS = words(
    "the bell rings,the dog barks,the cat runs,the lamp falls,the door opens,the wind blows,the baby cries,"
    "the rain starts,the river rises,the road floods,the train stops,the horse jumps,the bird sings,"
    "the fire starts,the ice melts,the leaf drops,the gate closes,the boat sinks,the clock stops,the child laughs,"
    "the cow sleeps,"
    "the car turns,the ball rolls,the bridge shakes,the light flashes,the glass breaks,the wheel spins,"
    "the king smiles,the snow slides,the phone buzzes"
)
# How many events the chain has, and how many another one has that never starts.
_EVENTS = {1: (2, 2), 2: (3, 2), 3: (4, 0), 4: (5, 2), 5: (6, 3)}


def _draw(rng: random.Random, level: int) -> Facts:
    length, idle = _EVENTS[level]
    # The first three levels always drew five events, of which levels 1 and 2 use the first and the last ones.
    events = rng.sample(EVENTS, max(5, length + idle))
    chain = events[:length]
    rules = [list(pair) for pair in pairwise(chain)]
    if idle:
        rules += [list(pair) for pair in pairwise(events[-idle:])]
    rng.shuffle(rules)
    return {"rules": rules, "start": chain[0], "chain": chain, "answer": chain[-1]}


def causal_premises(facts: Facts) -> str:
    """The rules, in the order shown."""
    return " ".join(f"When {a}, {b}." for a, b in facts["rules"])


def _plain(facts: Facts) -> tuple[str, str]:
    return (
        f"{causal_premises(facts)} {capital(facts['start'])}. What happens in the end?",
        f" {capital(facts['answer'])}.",
    )


CAUSAL = Kind(
    name="causal",
    draw=_draw,
    told=lambda facts: {"rules": causal_premises(facts), "start": facts["start"]},
    prompts=(
        "Trace the chain. {rules} Now {start}. The chain ends:",
        "Follow the chain. {rules} Now {start}. The chain ends:",
        "Trace it. {rules} Today {start}. It ends:",
        "One thing leads to the next. {rules} First {start}. The last thing:",
        "Find the end. {rules} It begins: {start}. It ends:",
        "Read the rules. {rules} So {start}. The end of it:",
        "Work it out. {rules} At the start {start}. At last:",
        "Go from step to step. {rules} Now {start}. The last step:",
        "A chain of causes. {rules} Look, {start}. What comes last?",
        "Here is what follows from what. {rules} Then {start}. In the end:",
        "Follow each rule until it ends. {rules} This time {start}. Last of all:",
        "Say how it ends. {rules} Today {start}. The story ends:",
    ),
    answer=lambda facts: f" finally, {facts['answer']}?",
    candidates=lambda facts: EVENTS,
    plain=_plain,
)
