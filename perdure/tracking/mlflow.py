"""MLflow: a run with a child run for each stage, in a local store or on a server."""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from perdure.errors import ConfigError, StorageError
from perdure.tracking.state import read_ids, write_ids
from perdure.tracking.tracker import Point, Tracker, parameters, reason, summary

EXPERIMENT = "perdure"
STAGE = "perdure.stage"  # the tag that says which stage a nested run is of
METRICS, PARAMETERS = 1000, 100  # most that one request may hold
VALUE, KEY = 500, 250  # longest that every version of MLflow takes
WAY_OUT = "start the server, or set MLFLOW_TRACKING_URI to a store that can be used"
# By itself MLflow tries eight times, with two minutes each; whoever wants that sets these.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


class MLflow(Tracker):
    """Track in MLflow: parameters, step metrics, scores, the summary, files; a nested run for each stage.

    Args:
        uri: of the store; None takes MLFLOW_TRACKING_URI, and without that `mlflow.db` beside the run's folder.
        experiment: its name; None takes MLFLOW_EXPERIMENT_NAME, and without that "perdure".
        run_name: None takes the run's own.
        say: tells a person where to look and what went wrong; None raises Python warnings for the latter.

    Raises:
        ConfigError: mlflow is not installed.
    """

    name = "mlflow"

    def __init__(
        self,
        uri: str | None = None,
        experiment: str | None = None,
        run_name: str | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(say)
        self._uri = uri
        self._experiment = experiment
        self._run_name = run_name
        self._client: Any = None
        self._folder: Path | None = None
        self._store = ""  # the store's address without a password
        self._experiment_id = ""
        self._run = ""
        self._children: dict[str, str] = {}  # ids of the stages' runs, by the stage's number
        self._open_child = ""
        self._doubtful: set[str] = set()  # runs that may hold points already
        self._known: dict[tuple[str, str], set[int]] = {}
        self._patience: list[str] = []

    def check(self, folder: Path | None = None) -> None:
        """Ask the store for the experiment, where there is one already.

        Raises:
            ConfigError: it cannot be reached, or a local one cannot be written.
        """
        uri = self._address(folder)
        place = _local(uri)
        if place is None or place.is_file():
            self._connect(uri, create=False)
        else:
            above = next(path for path in place.absolute().parents if path.exists())
            if not (above.is_dir() and os.access(above, os.W_OK)):
                raise ConfigError(f"mlflow: {place}: cannot be written; {WAY_OUT}")

    def _open(self, facts: Mapping[str, Any]) -> str:
        folder = Path(facts["folder"]) if "folder" in facts else None
        uri = self._address(folder)
        ids = read_ids(folder, _public(uri)) if folder is not None and not self._run else {}
        experiment = self._connect(uri, create=True)
        try:
            found = self._find(self._run or ids.get("run"))
            if found is None:
                tags = {"mlflow.source.name": "perdure", "mlflow.source.type": "LOCAL"}
                name = self._run_name or facts.get("name")
                found = self._client.create_run(experiment, run_name=name, tags=tags)
                self._children = {}
            else:
                self._client.update_run(found.info.run_id, status="RUNNING")
                self._children = self._children or dict(ids.get("stages", {}))
                self._doubtful = {found.info.run_id, *self._children.values()}
            self._run, self._experiment_id = found.info.run_id, found.info.experiment_id
            self._folder, self._store = folder, _public(uri)
            self._write_ids()
            self._log_parameters(self._run, parameters(facts), found.data.params)
        except StorageError:
            raise
        except Exception as error:
            raise ConfigError(f"mlflow: {_public(uri)}: {reason(error)}; {WAY_OUT}") from error
        if _local(uri) is not None:
            return f"look at it with: mlflow ui --backend-store-uri {_public(uri)}"
        return f"run {self._run} at {_public(uri)}"

    def _send(self, points: list[Point]) -> None:
        while points:
            chunk = _chunk(points)
            try:
                child = self._child(chunk[0])
                self._log(self._run, chunk)
                if child:
                    self._log(child, chunk)
            except Exception:
                # The store may have done what was asked all the same.
                self._doubtful |= {self._run, *self._children.values()}
                self._known.clear()
                raise
            del points[: len(chunk)]

    def _finish(self, results: Mapping[str, Any], files: Sequence[tuple[Path, str]]) -> None:
        self._log(self._run, [Point(int(results.get("steps") or 0), summary(results), 0, "", time.time())])
        for path, name in files:
            self._client.log_artifact(self._run, str(path), posixpath.dirname(name) or None)

    def _close(self, status: str) -> None:
        try:
            for run in filter(None, (self._open_child, self._run)):
                self._client.set_terminated(run, status)
        finally:
            self._open_child = ""
            for name in self._patience:
                os.environ.pop(name, None)
            self._patience = []

    def _address(self, folder: Path | None) -> str:
        given = self._uri or os.environ.get("MLFLOW_TRACKING_URI")
        if given:
            return given
        place = (folder.absolute().parent if folder is not None else Path.cwd()) / "mlflow.db"
        return f"sqlite:///{place}"

    def _connect(self, uri: str, create: bool) -> str:
        """The experiment's id, "" where there is none yet; afterwards the client is there."""
        # Figures of use go to MLflow's makers unless this is set.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        for name, value in PATIENCE.items():
            if name not in os.environ:
                os.environ[name] = value
                self._patience.append(name)
        from mlflow import MlflowClient

        for logger in ("mlflow.store.db.utils", "alembic.runtime.migration"):
            logging.getLogger(logger).setLevel(logging.WARNING)  # they tell of every table of a new store
        name = self._experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        place = _local(uri)
        try:
            if place is not None and create:
                place.parent.mkdir(parents=True, exist_ok=True)
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(name)
            if found is None and create:
                own = place is not None and not (self._uri or os.environ.get("MLFLOW_TRACKING_URI"))
                artifacts = (place.with_name("mlflow-artifacts")).as_uri() if own and place is not None else None
                try:
                    self._client.create_experiment(name, artifact_location=artifacts)
                except Exception:
                    # Another run may have made it in between.
                    if self._client.get_experiment_by_name(name) is None:
                        raise
                found = self._client.get_experiment_by_name(name)
        except Exception as error:
            raise ConfigError(f"mlflow: {_public(uri)} cannot be used: {reason(error)}; {WAY_OUT}") from error
        if found is None:
            return ""
        if found.lifecycle_stage == "deleted":
            raise ConfigError(
                f"mlflow: experiment {name!r} was deleted in {_public(uri)}; restore it, or set "
                "MLFLOW_EXPERIMENT_NAME to another name"
            )
        return str(found.experiment_id)

    def _find(self, run: str | None) -> Any:
        """The run of that id; None where the store has none, or it was deleted there."""
        from mlflow.exceptions import MlflowException

        if not run:
            return None
        try:
            found = self._client.get_run(run)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return None if found.info.lifecycle_stage == "deleted" else found

    def _log_parameters(self, run: str, wanted: Mapping[str, Any], there: Mapping[str, str]) -> None:
        """Parameters cannot be changed in MLflow: where one was, the new value is a tag, changed.<key>."""
        from mlflow.entities import Param, RunTag

        values = {_key(key): str(value)[:VALUE] for key, value in wanted.items()}
        new = [Param(key, value) for key, value in values.items() if key not in there]
        changed = [RunTag(f"changed.{k}"[:KEY], v) for k, v in values.items() if k in there and there[k] != v]
        for start in range(0, len(new), PARAMETERS):
            self._client.log_batch(run, params=new[start : start + PARAMETERS])
        for start in range(0, len(changed), PARAMETERS):
            self._client.log_batch(run, tags=changed[start : start + PARAMETERS])

    def _child(self, point: Point) -> str:
        """The run of the point's stage; "" before the first stage."""
        if not point.stage:
            return ""
        stage = str(point.stage)
        if stage not in self._children:
            run = self._lost_child(stage) or self._client.create_run(
                self._experiment_id,
                run_name=f"{stage} {point.task}".strip(),
                tags={"mlflow.parentRunId": self._run, "mlflow.source.name": "perdure", STAGE: stage},
            )
            facts = {key: self._facts[key] for key in ("strategy", "seed") if key in self._facts}
            facts |= {"task": point.task, "stage": stage}
            self._log_parameters(run.info.run_id, facts, run.data.params)
            self._children[stage] = run.info.run_id
            self._write_ids()
        child = self._children[stage]
        if self._open_child and child != self._open_child:
            self._client.set_terminated(self._open_child, "FINISHED")
        self._open_child = child
        return child

    def _lost_child(self, stage: str) -> Any:
        """The stage's run where the store has made one and its answer was lost."""
        if self._run not in self._doubtful:
            return None
        wanted = f"tags.`mlflow.parentRunId` = '{self._run}' and tags.`{STAGE}` = '{stage}'"
        found = self._client.search_runs([self._experiment_id], wanted, max_results=1)
        return found[0] if found else None

    def _log(self, run: str, points: Sequence[Point]) -> None:
        """Log the points that the run does not hold; a batch is one transaction, so one is there whole or not."""
        from mlflow.entities import Metric

        metrics = [
            Metric(_key(name), value, int(point.time * 1000), point.step)
            for point in points
            if not (run in self._doubtful and point.step in self._steps(run, next(iter(point.scalars), "")))
            for name, value in point.scalars.items()
        ]
        for start in range(0, len(metrics), METRICS):
            self._client.log_batch(run, metrics=metrics[start : start + METRICS])

    def _steps(self, run: str, name: str) -> set[int]:
        """The steps at which the run held a value of that name when it was last in doubt."""
        if (run, name) not in self._known:
            there = self._client.get_metric_history(run, _key(name)) if name else []
            self._known[run, name] = {metric.step for metric in there}
        return self._known[run, name]

    def _write_ids(self) -> None:
        if self._folder is not None:
            write_ids(self._folder, self._store, {"run": self._run, "stages": self._children})


def _chunk(points: Sequence[Point]) -> list[Point]:
    """The first points of one stage that fit one batch; at least one."""
    found, count = [points[0]], len(points[0].scalars)
    for point in points[1:]:
        count += len(point.scalars)
        if count > METRICS or point.stage != points[0].stage:
            break
        found.append(point)
    return found


def _key(name: str) -> str:
    """The name as MLflow takes it; one that had to be changed carries a hash, so that two stay two."""
    key = re.sub(r"[^\w./ \-]", "_", name)
    if posixpath.normpath(key) != key or key.startswith(("/", "..")):
        key = key.replace("/", "_").strip(".") or "_"
    if key != name or len(key) > KEY:
        key = f"{key[: KEY - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return key


def _local(uri: str) -> Path | None:
    """The file of a store that is one."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix).partition("?")[0]) if uri.startswith(prefix) else None


def _public(uri: str) -> str:
    """The address without a name and password in it."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
