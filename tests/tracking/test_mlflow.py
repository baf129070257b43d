"""MLflow: what a run leaves in a store, going on with it, a real server, and one that is gone."""

from __future__ import annotations

import json
import re
import shutil
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow")

from perdure.errors import ConfigError
from perdure.tracking import MLflow, tracker
from perdure.tracking.mlflow import KEY, _key, _public

pytestmark = pytest.mark.usefixtures("undrawn")

SCORES = {f"{metric}/{task}" for metric in ("loss", "exact_match") for task in ("ones", "threes")}


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def local(place: Path) -> str:
    return f"sqlite:///{place / 'runs' / 'mlflow.db'}"


def runs(uri: str, experiment: str = "perdure") -> tuple[list[Any], list[Any]]:
    """The experiment's runs, oldest first: those of runs, and those of stages."""
    there = client(uri)
    found = there.search_runs([there.get_experiment_by_name(experiment).experiment_id], order_by=["start_time ASC"])
    nested = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    return [run for run in found if run not in nested], nested


def history(uri: str, run: Any, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client(uri).get_metric_history(run.info.run_id, key)]


def artifacts(uri: str, run: Any, below: str | None = None) -> set[str]:
    found: set[str] = set()
    for item in client(uri).list_artifacts(run.info.run_id, below):
        found |= artifacts(uri, run, item.path) if item.is_dir else {item.path}
    return found


def logged(folder: Path) -> list[tuple[int, float]]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(event["step"], event["loss"]) for event in events if event["event"] == "step"]


def check_whole(uri: str, folder: Path, stages: int = 2) -> Any:
    """One run for the folder, finished, in which every step and score stands once; returns it."""
    (run,), nested = runs(uri)
    results = json.loads((folder / "results.json").read_text())
    steps = logged(folder)
    assert run.info.status == "FINISHED"
    assert history(uri, run, "train/loss") == steps
    assert len(nested) == stages
    each = len(steps) // stages
    for i, child in enumerate(nested):
        task = results["stages"][i]
        assert child.data.tags["mlflow.parentRunId"] == run.info.run_id
        assert (child.info.run_name, child.info.status) == (f"{i + 1} {task}", "FINISHED")
        assert child.data.params["task"] == task
        assert history(uri, child, "train/loss") == steps[i * each : (i + 1) * each]
    for metric, matrix in results["scores"].items():
        for j, task in enumerate(matrix["tasks"]):
            column = [row[j] for row in matrix["values"] if row[j] is not None]
            assert [value for _, value in history(uri, run, f"{metric}/{task}")] == column
        for figure in ("average", "forgetting", "learning"):
            assert run.data.metrics[f"summary/{metric}/{figure}"] == results["metrics"][metric][figure]
    files = {"config.yaml", "results.json", "scores.csv", "scores_loss.csv", "report.html"}
    plots = {f"plots/{path.name}" for path in (folder / "plots").iterdir()}
    assert artifacts(uri, run) == files | plots
    return run


def test_a_run_in_a_local_store(perdure: Callable[..., Any], recipe: Path, store: Path) -> None:
    done = perdure("run", recipe, "--out", "runs/a", "--track", "mlflow")
    assert done.code == 0, done.err
    uri = local(store)
    assert f"mlflow ui --backend-store-uri {uri}" in done.out.replace("\n", "")
    run = check_whole(uri, Path("runs/a"))
    assert run.info.run_name == "a"
    assert (store / "runs" / "mlflow-artifacts").is_dir()
    wanted = {"strategy": "replay", "seed": "0", "optimizer.lr": "0.01", "stream.tasks.1.name": "threes"}
    assert wanted.items() <= run.data.params.items()
    assert {"versions.torch", "versions.perdure", "machine.threads", "batch_size"} <= set(run.data.params)
    assert {"train/lr", "train/tokens_per_second", "train/gradient_norm", "train/replayed", "probe/loss"} <= set(
        run.data.metrics
    )
    assert set(run.data.metrics) >= SCORES


def test_tracking_changes_nothing_in_the_folder(
    perdure: Callable[..., Any], recipe: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes but for times, the report that shows them, and the trackers' own."""
    both = ("--track", "mlflow", "--track", "tensorboard")
    assert perdure("run", recipe, "--out", "runs/a", *both).code == 0
    (tmp_path / "plain").mkdir()
    monkeypatch.chdir(tmp_path / "plain")
    assert perdure("run", recipe, "--out", "runs/a").code == 0

    def contents(folder: Path) -> dict[str, bytes]:
        found = {}
        for path in folder.rglob("*"):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name not in ("report.html", ".lock"):
                times = rb'"(seconds|tokens_per_second)": [0-9.]+'
                found[name] = re.sub(times, b"", path.read_bytes())
        return found

    with_, without = contents(store / "runs" / "a"), contents(tmp_path / "plain" / "runs" / "a")
    own = {name for name in with_ if name == "tracking.json" or name.startswith("tensorboard/")}
    assert len(own) == 2
    assert {name: text for name, text in with_.items() if name not in own} == without
    assert len(without) > 10
    assert "track" not in json.loads((store / "runs" / "a" / "results.json").read_text())["command"]


def test_a_stopped_run_goes_on_in_the_same_place(
    perdure: Callable[..., Any], recipe: Path, store: Path, interrupt: Callable[..., None]
) -> None:
    """Every step stands once, though the second half begins with what the first one had sent already."""
    command = ("run", recipe, "--out", "runs/a", "--track", "mlflow", "--set", "checkpoint_every=2")
    interrupt(3)
    stopped = perdure(*command)
    assert stopped.code == 130
    assert "--track mlflow" in stopped.err.replace("\n", " ")
    (run,), _ = runs(local(store))
    assert (run.info.status, len(history(local(store), run, "train/loss"))) == ("KILLED", 3)
    assert perdure(*command, "--resume").code == 0
    assert check_whole(local(store), Path("runs/a")).info.run_id == run.info.run_id


def test_a_killed_run_goes_on_where_points_were_lost_and_where_some_are_taken_again(
    perdure: Callable[..., Any], recipe: Path, store: Path, interrupt: Callable[..., None]
) -> None:
    """Back at step 2 after 7 steps: of these, the store holds all (sent) or none (lost on the way)."""
    command = ("run", recipe, "--track", "mlflow", "--set", "checkpoint_every=2", "--set", "checkpoint_keep=9")
    interrupt(3)
    assert perdure(*command, "--out", "runs/a").code == 130
    last = max(Path("runs/a/checkpoints").iterdir(), key=lambda path: path.name)
    assert last.name == "step-00000003"
    shutil.rmtree(last)  # as if killed before it was written
    assert perdure(*command, "--out", "runs/a", "--resume").code == 0
    check_whole(local(store), Path("runs/a"))


def test_tracking_may_begin_late_and_be_done_twice(
    perdure: Callable[..., Any], recipe: Path, store: Path, interrupt: Callable[..., None]
) -> None:
    """The log fills the store; a finished run that is told of again leaves it as it is."""
    interrupt(3)
    assert perdure("run", recipe, "--out", "runs/a").code == 130
    assert perdure("run", recipe, "--out", "runs/a", "--resume").code == 0
    for _ in range(2):
        done = perdure("run", recipe, "--out", "runs/a", "--resume", "--track", "mlflow")
        assert done.code == 0, done.err
        check_whole(local(store), Path("runs/a"))


def test_an_extension_goes_on_and_an_erasure_does_not(
    perdure: Callable[..., Any], recipe: Path, store: Path
) -> None:
    assert perdure("run", recipe, "--out", "runs/a", "--track", "mlflow").code == 0
    fives = recipe.parent / "fives.jsonl"
    held = recipe.parent / "fives-held.jsonl"
    done = perdure("extend", "runs/a", "--task", fives, "--evaluation", held, "--track", "mlflow")
    assert done.code == 0, done.err
    run = check_whole(local(store), Path("runs/a"), stages=3)
    assert run.data.params["extensions.0.name"] == "fives"
    key = json.loads(Path("runs/a/keys/stage-001.jsonl").read_text().splitlines()[0])[1]
    erased = perdure("erase", "runs/a", "--key", key)
    assert erased.code == 0, erased.err
    said = " ".join(erased.out.split())
    assert f"note: run {run.info.run_id} in {local(store)} was tracked with the rows in it" in said
    assert not Path("runs/a/tracking.json").exists()
    assert perdure("verify", "runs/a").code == 0


def test_the_demo_takes_trackers(
    perdure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each of its runs is handed the names; what becomes of them is the business of the runs' own tests."""
    from perdure.recipes import demo

    taken = []
    monkeypatch.setattr(demo, "execute", lambda *arguments: taken.append(arguments[-1]))
    monkeypatch.setattr(demo, "write_pages", lambda *_: None)
    monkeypatch.setattr(demo, "print_results", lambda *_: None)
    assert perdure("demo", "--out", tmp_path, "--track", "mlflow", "--track", "tensorboard").code == 0
    assert taken == [["mlflow", "tensorboard"]] * 3


def test_a_run_on_a_server(
    perdure: Callable[..., Any], recipe: Path, store: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "skills")
    done = perdure("run", recipe, "--out", "runs/a", "--track", "mlflow")
    assert done.code == 0, done.err
    (run,), nested = runs(server, "skills")
    assert f"mlflow: run {run.info.run_id} at {server}" in done.out.replace("\n", " ")
    assert (run.info.status, len(nested)) == ("FINISHED", 2)
    assert history(server, run, "train/loss") == logged(Path("runs/a"))
    assert {"report.html", "scores.csv"} < artifacts(server, run)
    text = client(server).download_artifacts(run.info.run_id, "results.json", str(store))
    assert Path(text).read_bytes() == Path("runs/a/results.json").read_bytes()


class Line(socketserver.ThreadingTCPServer):
    """A line to a server that can be cut and put back."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: str, port: int = 0) -> None:
        target = address.rpartition("//")[2].split(":")
        open_ends = self.open_ends = []

        class Both(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection((target[0], int(target[1]))) as far:
                    open_ends.extend((self.request, far))
                    back = threading.Thread(target=pump, args=(far, self.request), daemon=True)
                    back.start()
                    pump(self.request, far)
                    back.join()

        super().__init__(("127.0.0.1", port), Both)
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def cut(self) -> None:
        self.shutdown()
        self.server_close()
        for end in self.open_ends:
            _shut(end)


def pump(a: socket.socket, b: socket.socket) -> None:
    with suppress(OSError):
        while data := a.recv(1 << 16):
            b.sendall(data)
    _shut(b)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def line(server: str) -> Iterator[Line]:
    with Line(server) as there:
        yield there
        there.cut()


def test_a_server_that_goes_away_stops_no_run(
    perdure: Callable[..., Any],
    recipe: Path,
    store: Path,
    server: str,
    line: Line,
    monkeypatch: pytest.MonkeyPatch,
    interrupt: Callable[..., None],
) -> None:
    """It is told of once; when the server is back, the finished run is made whole."""
    monkeypatch.setattr(tracker, "SECONDS", 0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{line.port}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    interrupt(5, line.cut)
    done = perdure("run", recipe, "--out", "runs/a", "--track", "mlflow")
    assert done.code == 0, done.err
    assert (done.out + done.err).count("warning: mlflow: ") == 1
    (run,), _ = runs(server, "gone")
    assert run.info.status == "RUNNING"
    assert len(history(server, run, "train/loss")) < 8
    with Line(server, line.port) as again:
        assert perdure("run", recipe, "--out", "runs/a", "--resume", "--track", "mlflow").code == 0
        again.cut()
    (run,), nested = runs(server, "gone")
    assert (run.info.status, len(nested)) == ("FINISHED", 2)
    assert history(server, run, "train/loss") == logged(Path("runs/a"))
    assert "report.html" in artifacts(server, run)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "http://127.0.0.1:{silent}"], ids=["refused", "silent"])
def test_a_server_that_cannot_be_reached_ends_it_at_once(
    perdure: Callable[..., Any], recipe: Path, store: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    """Also one that takes connections and never answers; nothing is left behind."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(silent=silent.getsockname()[1]))
        if "silent" in uri:
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        start = time.perf_counter()
        done = perdure("run", recipe, "--out", "runs/a", "--track", "mlflow")
        assert time.perf_counter() - start < 20
    assert done.code == 2
    assert re.match(r"error: mlflow: http://127.0.0.1:\d+ cannot be used: .*MLFLOW_TRACKING_URI", done.err)
    assert done.err.count("\n") == 1
    assert not Path("runs/a").exists()


def test_a_folder_that_cannot_hold_the_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"mlflow.db: cannot be written"):
        MLflow().check(tmp_path / "file" / "run")


def test_a_script_is_tracked_too(store: Path, make_mlp: Callable[..., Any]) -> None:
    import torch

    from perdure import ContinualTrainer
    from perdure.strategies import Replay

    uri = local(store)
    rows = [(torch.randn(5, generator=torch.Generator().manual_seed(i)), i % 3) for i in range(16)]
    config = {"batch_size": 4, "optimizer": {"lr": 0.01}}
    tracked = [MLflow(uri, experiment="script", run_name="mine")]
    with ContinualTrainer(make_mlp(), Replay(capacity=4), config, callbacks=tracked) as trainer:
        for i in range(2):
            trainer.train_task(rows[:8], rows[8:], i, f"t{i}", num_epochs=2)
    (run,), nested = runs(uri, "script")
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert [child.info.run_name for child in nested] == ["1 t0", "2 t1"]
    assert [step for step, _ in history(uri, run, "train/loss")] == list(range(1, 9))
    assert run.data.params["continual_strategy.replay.capacity"] == "4"
    assert len(history(uri, run, "accuracy/t0")) == 3
    assert "summary/accuracy/average" in run.data.metrics


def test_names_that_mlflow_would_refuse() -> None:
    """Changed ones stay apart from each other, and every one passes MLflow's own check."""
    from mlflow.utils.validation import _validate_metric_name

    names = ["loss/a+b", "loss/a*b", "loss/..", "loss//b", "/x", "é/ö", "x" * 300, "loss/a b", "train/loss"]
    keys = [_key(name) for name in names]
    for key in keys:
        _validate_metric_name(key)
        assert len(key) <= KEY
    assert len(set(keys)) == len(names)
    assert keys[-2:] == ["loss/a b", "train/loss"]


def test_passwords_stay_out_of_what_is_written() -> None:
    assert _public("https://ada:secret@host:5000/x") == "https://host:5000/x"
    assert _public("sqlite:////a/b@c.db") == "sqlite:////a/b@c.db"
