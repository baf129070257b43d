"""The allocator's settings: made on Linux's own C library, and left alone where somebody made them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import Any

import pytest

from perdure import allocator
from perdure.allocator import KEPT, MAPPED, keep_freed_memory

GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES":
            monkeypatch.delenv(name)


class Library:
    """A C library that notes what it is told, and takes no more than `most`."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []
        self.most = 2**31 - 1  # an int

    def mallopt(self, parameter: int, value: int) -> int:
        self.told.append((parameter, value))
        return int(value <= self.most)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: found)
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    return found


def test_both_thresholds_are_set(library: Library) -> None:
    assert keep_freed_memory()
    assert library.told == [(-3, MAPPED[0]), (-1, KEPT)]  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h


def test_an_older_library_takes_less(library: Library) -> None:
    library.most = 1 << 25
    assert not keep_freed_memory()  # the other threshold is more than this one takes
    assert library.told == [(-3, MAPPED[0]), (-3, MAPPED[1]), (-1, KEPT)]


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")]
)
def test_what_the_environment_says_stays(
    library: Library, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()
    assert not library.told


def test_other_systems_are_left_alone(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not keep_freed_memory()
    assert not library.told


def test_a_library_without_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
@pytest.mark.parametrize(("told", "faults"), [(True, False), (False, True)])
def test_freed_memory_stays_with_the_process(told: bool, faults: bool) -> None:
    """40 MB that are written, freed and asked for again: page by page from the system, or as they are."""
    code = f"""
import ctypes, resource
from perdure.allocator import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
{"assert keep_freed_memory()" if told else ""}
def use():
    block = libc.malloc(40 << 20)
    ctypes.memset(block, 1, 40 << 20)
    libc.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pages = 5 * (40 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert (int(done.stdout) > pages // 2) is faults
