"""Shows a figure in a window until it is closed. The only place with pyplot, which has windows."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from matplotlib.figure import Figure

from perdure.report.canvas import style


def has_screen() -> bool:
    """Whether a window could be opened: a screen is there, and matplotlib finds a toolkit that works on it."""
    if sys.platform not in ("darwin", "win32") and not any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY"))):
        return False
    import matplotlib.pyplot as plt
    from matplotlib.backends import backend_registry

    try:
        # Without a toolkit, or where the screen does not answer, pyplot falls back to a backend without windows.
        return backend_registry.resolve_backend(plt.get_backend())[1] is not None
    except (ImportError, RuntimeError):
        return False


def show(draw: Callable[[], Figure], name: str) -> bool:
    """Draw, show, and return True when the window was closed; False where none could be opened.

    Args:
        draw: makes the figure; called within this package's style, which holds as long as the window is open.
        name: the window's title.
    """
    import matplotlib.pyplot as plt

    with style():
        figure = draw()
        try:
            plt.switch_backend(plt.get_backend())
            # The manager is given a figure that is drawn already, where it would make an empty one.
            plt.figure(FigureClass=lambda *_, **__: figure)  # type: ignore[arg-type]
        except Exception:
            # Each toolkit has errors of its own for a screen that is gone or refuses.
            plt.close("all")
            return False
        manager = figure.canvas.manager
        if manager is not None:
            manager.set_window_title(name)
        plt.show(block=True)
        plt.close(figure)
    return True
