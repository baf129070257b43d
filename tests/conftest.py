"""Fixtures that several rooms' tests need."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _below_shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(
            f"{'/'.join(('shared', *parts))} is not beside the repository: real data and models are not shipped"
        )
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the repository."""
    return _below_shared()


@pytest.fixture(scope="session")
def bitstories() -> Path:
    """A real 3.3M-parameter causal LM."""
    return _below_shared("models", "bitstories-3.3M")


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A real 0.26M-parameter causal LM."""
    return _below_shared("models", "stories260K")
