"""Poison for tests: images that do to their decoder what broken C code would do.

With this folder on PYTHONPATH, every Python process that imports ``cnnray.images.decode`` gets it:
an image file followed by ``cnnray-poison:ACTION;`` acts when it is decoded. No other does.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import sys
import time
from importlib.machinery import PathFinder

TARGET = "cnnray.images.decode"
MAGIC = re.compile(rb"cnnray-poison:([a-z]+);")


def abort() -> None:
    os.abort()


def segfault() -> None:
    ctypes.string_at(0)


def leave() -> None:
    os._exit(3)


def sleep() -> None:
    while True:
        time.sleep(1)


def slow() -> None:
    """Longer than usual, but not for ever."""
    time.sleep(0.5)


def spin() -> None:
    """An endless loop in C that never gives back the interpreter's lock."""
    sum(range(10**15))


def bloat() -> None:
    """Much memory in many pieces; without a limit, what the kernel would then do."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        os.kill(os.getpid(), signal.SIGKILL)
    pieces = []
    while True:
        pieces.append(bytes(1024 * 1024))


def huge() -> None:
    """One piece of memory that no machine has."""
    bytearray(10**14)


ACTIONS = {
    action.__name__.encode(): action
    for action in (abort, segfault, leave, sleep, slow, spin, bloat, huge)
}


def poisonous(reader):
    """The same reader of image files, but for those with poison after their end."""

    def read(file):
        if found := MAGIC.search(file.getvalue()):
            ACTIONS[found[1]]()
        return reader(file)

    return read


class PoisonFinder:
    """Finds one module, and wraps what it opens image files with as soon as it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != TARGET:
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for kind, reader in module._READERS.items():
                module._READERS[kind] = poisonous(reader)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, PoisonFinder())
