"""`perdure reactions`: one run from options to figures."""

from __future__ import annotations

from collections.abc import Sequence

from perdure.errors import ConfigError, RunError, unknown_name
from perdure.recipes.reactions.options import Options, cut_as_before, default_out, settings_for
from perdure.recipes.reactions.outputs import print_summary, write_outputs, written
from perdure.recipes.reactions.predict import opened
from perdure.recipes.run import check_data, execute, finished, pinned
from perdure.recipes.show import print_results, write_pages
from perdure.recipes.track import track_finished
from perdure.training.display import Terminal
from perdure.training.folder import RunFolder

TORCH, JAX = "torch", "jax"
BACKENDS = (TORCH, JAX)


def run_reactions(
    options: Options,
    overrides: Sequence[str],
    resume: bool,
    again: str,
    track: Sequence[str] = (),
    backend: str = TORCH,
) -> None:
    """Run it in a folder, and print what came of it beside the baseline."""
    if backend not in BACKENDS:
        raise ConfigError(unknown_name("backend", backend, BACKENDS))
    if backend == JAX:
        from perdure.recipes.reactions.jax_settings import check, check_asked

        check_asked(options.setting, options.model)
    settings = settings_for(options, overrides, backend)
    if backend == JAX:
        check(settings)
    folder = RunFolder(options.out or default_out(settings, options.setting, backend))
    display = Terminal()
    if folder.exists and not resume:
        raise RunError(f"{folder.path} holds a run already: add --resume to go on with it, or give another --out")
    if resume and not folder.exists:
        display.say(f"{folder.path}: no run here yet; starting")
    if folder.exists:
        _refuse_other(folder, backend)
        from perdure.training.plan import changed_settings, fixed_settings

        theirs = folder.settings()
        settings = cut_as_before(pinned(settings, theirs), theirs, overrides)
        folder.refuse_changed(changed_settings(fixed_settings(theirs), fixed_settings(settings)))
        if finished(folder):
            if backend == TORCH:
                check_data(theirs, None, folder, display)
            if written(folder):
                display.say(f"{folder.path}: this run is finished; nothing to do")
            else:
                display.say(f"{folder.path}: this run is finished; writing its tables")
                write_outputs(*opened(theirs, folder, display))
                write_pages([folder.path])
            track_finished(folder, track, display)
            show(folder, display)
            return
        settings = settings.model_copy(update={"extensions": theirs.extensions, "erased": theirs.erased})
    if backend == JAX:
        from perdure.recipes.reactions import jax_backend

        jax_backend.execute(settings, folder, display, again, track)
    else:
        execute(settings, None, folder, display, again, track)
    show(folder, display)


def _refuse_other(folder: RunFolder, backend: str) -> None:
    """Refuse to go on with a run of the other backend: neither reads the other's state."""
    theirs = folder.recorded().get("backend", TORCH)
    if theirs != backend:
        raise RunError(f"{folder.path}: this run is of the {theirs} backend; go on with --backend {theirs}")


def show(folder: RunFolder, display: Terminal) -> None:
    """The tables of a finished run, and its baseline."""
    print_results([folder.path], display)
    print_summary(folder.path, display.say)
