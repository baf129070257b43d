"""Reads the folder of an arena run into plain values; every mistake in it is named by file and key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from perdure.errors import NewerFormatError, RunError
from perdure.report.arena_json import Node, read_object, read_objects
from perdure.report.arena_run import UNKNOWN, ArenaRun, Episode, Estimate, Moments, Phase, Point, Scores, Split
from perdure.report.read import CONFIG, EVENTS, RESULTS

FORMAT = 1
RECIPE = "arena"


def is_arena_run(folder: Path) -> bool:
    """Whether results.json says so, or the log of a run that has not written one yet."""
    if (folder / RESULTS).is_file():
        try:
            return read_object(folder / RESULTS).get("recipe") == RECIPE
        except RunError:
            return False
    return any(event.get("event") == "episode" for event in read_objects(folder / EVENTS))


def read_arena_run(path: Path | str) -> ArenaRun:
    """Read the folder of one finished arena run.

    Raises:
        RunError: it is no such folder, not finished, or a key of results.json is missing or wrong.
        NewerFormatError: a later perdure wrote it.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is a file, not a run folder" if path.exists() else "does not exist"
        raise RunError(f"{path} {what}; give the folder of an arena run")
    if not (path / RESULTS).is_file():
        if is_arena_run(path):
            raise RunError(
                f"{path} is not finished: it has no {RESULTS} yet; let `perdure arena` end the run first"
            )
        raise RunError(f"{path} is no arena run: it has no {RESULTS}; give the folder that `perdure arena` wrote")
    run = arena_run(read_object(path / RESULTS), path, read_objects(path / EVENTS))
    return replace(run, config=_config(path / CONFIG))


def arena_run(
    results: Mapping[str, Any], path: Path | str = ".", events: tuple[Mapping[str, Any], ...] = ()
) -> ArenaRun:
    """A run from the content of its results.json and the lines of its metrics.jsonl; errors as `read_arena_run`."""
    path = Path(path)
    top = Node(path / RESULTS, "", results)
    _is_one(top)
    for key in ("method", "model", "strategy"):
        top.at(key).text()
    top.at("seed").whole()
    top.at("episodes").whole()
    for level in top.at("levels").entries():
        level.whole()
    name = top.get("name").value
    names = [node.text() for node in top.at("tasks").entries()]
    kinds = top.at("kinds")
    parameters = top.at("parameters")
    return ArenaRun(
        path=path,
        name=top.at("name").text() if name else path.resolve().name,
        results=results,
        scores=_scores(top, top.at("eval_tasks").whole(), top.get("pretraining_wording"), "exact_match"),
        kinds={
            key: _scores(kinds.at(key), kinds.at(key).at("rows").whole(), kinds.at(key).get("plain"))
            for key in names
        },
        phases=tuple(map(_phase, top.at("phases").entries())),
        history=_history(top.at("history")),
        probe=_probe(top.get("probe")),
        trainable=parameters.at("trainable").whole(),
        total=parameters.at("total").whole(),
        seconds_per_episode=top.at("seconds_per_episode").number_or_nan(),
        adapted=_ends(top.get("adapted"), "exact_match"),
        inferred=_ends(top.get("inferred")),
        log=_log(events),
    )


def _is_one(top: Node) -> None:
    """Refuse what is no finished arena run of a format that is known here."""
    if top.get("recipe").value != RECIPE:
        raise RunError(f"{top.file}: no arena run: recipe must be {RECIPE!r}, got {top.get('recipe').value!r}")
    version = top.at("format").whole()
    if version > FORMAT:
        raise NewerFormatError(
            f"{top.file}: format {version} is newer than this perdure reads ({FORMAT}); upgrade perdure"
        )
    if top.at("finished").value is not True:
        raise RunError(f"{top.file}: finished is not true: let `perdure arena` end the run first")


def _scores(node: Node, rows: int, plain: Node, key: str = "") -> Scores:
    """The scores that stand in `node`; `plain` holds those in the wording of pretraining, under `key`."""
    intervals, stated = node.at("intervals"), node.at("stated")
    exact = {moment: _estimate(node.at(moment), intervals.get(moment)) for moment in ("initial", "final", "best")}
    return Scores(
        rows,
        Moments(**exact),
        Moments(**{moment: Estimate(stated.get(moment).share_or_nan()) for moment in exact}),
        _ends(plain, key),
        Split(**{one.name: node.get("elicitation").get(one.name).share_or_nan() for one in fields(Split)}),
    )


def _ends(node: Node, key: str = "") -> Moments:
    """Shares at the beginning and at the end, each under `key` if there is one; unknown where there are none."""
    ends = [node.get(moment).get(key) if key else node.get(moment) for moment in ("initial", "final")]
    return Moments(*(Estimate(end.share_or_nan()) for end in ends))


def _estimate(value: Node, interval: Node) -> Estimate:
    """A share with its interval; without one where it is null."""
    if interval.value is None:
        return Estimate(value.share_or_nan())
    ends = interval.entries()
    if len(ends) != 2:
        raise interval.wrong("two numbers")
    return Estimate(value.share_or_nan(), ends[0].share_or_nan(), ends[1].share_or_nan())


def _phase(node: Node) -> Phase:
    begin, end = node.at("from").whole(), node.at("to").whole()
    return Phase(node.at("name").text(), begin, end, node.at("gain").number())


def _history(node: Node) -> tuple[Point, ...]:
    points = [
        Point(
            episode=entry.at("episode").whole(),
            exact=_estimate(entry.at("exact_match"), entry.get("interval")),
            stated=entry.get("stated").share_or_nan(),
            kinds={key: one.share_or_nan() for key, one in entry.at("kinds").items()},
            probe=entry.get("probe").get("exact_match").share_or_nan(),
        )
        for entry in node.entries()
    ]
    if not points:
        raise node.wrong("at least one evaluation")
    return tuple(sorted(points, key=lambda point: point.episode))


def _probe(node: Node) -> dict[str, tuple[float, float]]:
    """Before and after by metric; nothing where no probe was scored."""
    found = {}
    for metric, pair in node.items():
        ends = [one.number_or_nan() for one in pair.entries()]
        if ends:
            found[metric] = (ends[0], ends[-1] if len(ends) > 1 else UNKNOWN)
    return found


def _config(path: Path) -> dict[str, Any]:
    """The settings of a run; none where the file is gone."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path}: not YAML that can be read: {error}") from error
    if not isinstance(found, dict):
        raise Node(path, "", found).wrong("a mapping of settings")
    return found


def _log(events: tuple[Mapping[str, Any], ...]) -> tuple[Episode, ...]:
    """The episodes in order; a resumed run repeats those after its checkpoint, and the last word counts."""
    found: dict[int, Episode] = {}
    for event in events:
        number = event.get("episode")
        if event.get("event") == "episode" and isinstance(number, int):
            right = [event.get(key) for key in ("right_before", "right_after")]
            before, after = (UNKNOWN if x is None else float(bool(x)) for x in right)
            found[number] = Episode(number, str(event.get("kind", "")), before, after)
    return tuple(found[number] for number in sorted(found))
