"""A store of MLflow that is made once, a server, and runs to track."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs; making one takes seconds, so that tests copy this one."""
    pytest.importorskip("mlflow")
    from perdure.tracking import MLflow

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        MLflow(f"sqlite:///{path}")._connect(f"sqlite:///{path}", create=False)
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a store beside where runs go by themselves."""
    place = tmp_path / "work"
    (place / "runs").mkdir(parents=True)
    shutil.copyfile(empty_store, place / "runs" / "mlflow.db")
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="session")
def _starting(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(empty_store, folder / "mlflow.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
                "--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
                "--artifacts-destination", str(folder / "artifacts"),
            ],
            env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            yield f"http://127.0.0.1:{port}", folder / "log"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def server(_starting: tuple[str, Path]) -> str:
    """The address of a real `mlflow server` with a store of its own."""
    address, log = _starting
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                assert answer.read() == b"OK"
                return address
        except OSError:
            time.sleep(0.1)
    pytest.fail(log.read_text())


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Do something at the n-th step of a run, once; by default ask it to stop."""

    def at(step: int, act: Callable[[], Any] = lambda: signal.raise_signal(signal.SIGINT)) -> None:
        from perdure.training.display import Terminal

        left = [step]

        def count(*_: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                act()

        monkeypatch.setattr(Terminal, "step", count)

    return at
