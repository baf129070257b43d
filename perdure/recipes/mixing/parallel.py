"""Several selections at once: a process for each, with its share of the threads, and a bar for each."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from perdure.errors import PerdureError, RunFailure
from perdure.training.display import FIELDS, Display, progress
from perdure.training.interrupt import Interrupted, stop_on_signals
from perdure.training.learner import StepResult

LARGE = 200e6  # bytes of weights from which on a model fills the processor by itself
MOST = 4
GRACE = 60.0  # seconds to save in
Message = tuple[str, str, Any]
Work = Callable[[str, Display], None]


class Failed(RunFailure):
    """A process ended in an error, of which the message is this one's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def workers_for(model_bytes: int, jobs: int) -> int:
    """How many processes are worth it: one with a GPU or a large model, else one for each core, four at most."""
    import torch

    if torch.cuda.is_available() or model_bytes > LARGE:
        return 1
    return max(1, min(jobs, os.cpu_count() or 1, MOST))


class Remote(Display):
    """Sends what a run says of itself to the process that shows it."""

    def __init__(self, name: str, pipe: Connection) -> None:
        self.name, self.pipe = name, pipe
        self.done = self.total = 0
        self.parent = os.getppid()
        self._busy = False
        self._waiting: list[Message] = []

    def send(self, kind: str, value: Any) -> None:
        """Send a message; one that a signal's handler wants to send within another waits for that one's end."""
        self._waiting.append((kind, self.name, value))
        if self._busy:
            return
        self._busy = True
        try:
            while self._waiting:
                self.pipe.send(self._waiting.pop(0))
        except OSError:
            signal.raise_signal(signal.SIGTERM)  # nobody is left to show anything to: save, and end
        finally:
            self._busy = False

    def say(self, text: str) -> None:
        """One line of text."""
        self.send("say", text)

    def start(self, total: int, done: int, name: str, fields: Sequence[str] = FIELDS) -> None:
        """Training begins."""
        self.done, self.total = done, total
        self.send("progress", (done, total, ""))

    def step(self, task: str, result: StepResult, tokens_per_second: float) -> None:
        """One step was taken."""
        if os.getppid() != self.parent:
            signal.raise_signal(signal.SIGTERM)  # nobody is left to show anything to: save, and end
        self.done += 1
        self.send("progress", (self.done, self.total, f"{task}, loss {result.loss:.3f}"))

    def doing(self, what: str) -> None:
        """Something other than steps is going on."""
        self.send("progress", (self.done, self.total, what))


def run_all(names: Sequence[str], work: Work, workers: int, display: Display, again: str) -> None:
    """Do the work of every name, `workers` at once.

    Args:
        names: of what is to be done.
        work: (name, display) -> None; a function that another process can import, or a partial of one.
        workers: processes at once.
        display: where lines go; one with a console shows a bar for each name.
        again: the command that goes on with what was stopped.

    Raises:
        Failed: one of them did; those that had begun were let finish.
        Interrupted: asked to stop; those that had begun have saved themselves.
    """
    if workers <= 1:
        for name in names:
            work(name, display)
        return
    failures: dict[str, tuple[str, int]] = {}
    with stop_on_signals(display.say) as stop, _Bars(display) as bars:
        pool = _Pool(work, max(1, (os.cpu_count() or 1) // workers))
        waiting = list(names)
        asked = False
        try:
            while (waiting and not failures and not stop) or pool.running:
                while waiting and len(pool.running) < workers and not failures and not stop:
                    pool.start(waiting.pop(0))
                if stop and not asked:
                    asked = True
                    pool.stop()
                for message in pool.received():
                    _take(message, bars, failures)
        finally:
            pool.close()
        if stop:
            raise Interrupted(f"stopped, and saved. Go on with: {again} --resume")
    if failures:
        code = max(code for _, code in failures.values())
        raise Failed("\n".join(f"{name}: {text}" for name, (text, _) in failures.items()), code)


class _Pool:
    """The processes that are at work, and what they say, each through a pipe of its own."""

    def __init__(self, work: Work, threads: int) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.work, self.threads = work, threads
        self.running: dict[str, tuple[Any, Connection]] = {}

    def start(self, name: str) -> None:
        here, there = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_child, args=(name, self.work, self.threads, there))
        process.start()
        there.close()  # so that the end of the process is the end of the pipe
        self.running[name] = (process, here)

    def stop(self) -> None:
        """Ask each to save itself and end."""
        for process, _ in self.running.values():
            process.terminate()

    def close(self) -> None:
        """Leave none behind."""
        self.stop()
        for process, _ in self.running.values():
            process.join(GRACE)
            process.kill()
            process.join()

    def received(self) -> Iterator[Message]:
        """What comes within a tenth of a second; a process that ended otherwise than well is a failure."""
        pipes = {pipe: name for name, (_, pipe) in self.running.items()}
        for ready in wait(list(pipes), timeout=0.1):
            name = pipes[ready]  # type: ignore[index]
            try:
                while self.running[name][1].poll():
                    yield self.running[name][1].recv()
            except (EOFError, OSError):
                process, pipe = self.running.pop(name)
                process.join()
                pipe.close()
                if process.exitcode:
                    yield "ended", name, (f"its process ended with {process.exitcode}", 1)


def _take(message: Message, bars: _Bars, failures: dict[str, tuple[str, int]]) -> None:
    kind, name, value = message
    if kind == "say":
        bars.say(f"{name}: {value}")
    elif kind == "progress":
        bars.show(name, *value)
    elif kind == "failed" or name not in failures:
        failures[name] = value


def _child(name: str, work: Work, threads: int, pipe: Connection) -> None:
    import torch

    if hasattr(os, "setsid"):
        os.setsid()  # a terminal's Ctrl-C reaches the parent alone, which passes it on once
    torch.set_num_threads(threads)
    remote = Remote(name, pipe)
    try:
        work(name, remote)
    except PerdureError as error:
        remote.send("failed", (str(error), error.exit_code))
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # asked twice: at once, and without a trace


class _Bars:
    """A bar for each name where there is a terminal, and lines everywhere."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.console = getattr(display, "console", None)
        self.bars: dict[str, Any] = {}
        self.progress: Any = None

    def __enter__(self) -> _Bars:
        if self.console is not None and self.console.is_terminal:
            self.progress = progress(self.console, ("doing",))
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def say(self, text: str) -> None:
        self.display.say(text)

    def show(self, name: str, done: int, total: int, doing: str) -> None:
        if self.progress is None or not total:
            return
        if name not in self.bars:
            self.bars[name] = self.progress.add_task(name, total=total, completed=done, doing=doing)
        self.progress.update(self.bars[name], completed=done, total=total, doing=doing)
