"""A mutant is a module that names one function, and what stands in its place in every process."""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

_OWN = {"applying", "test_mutants", "__main__"}


def names() -> list[str]:
    """Return all mutants."""
    found = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(each.name for each in found if each.name not in _OWN)


def module(name: str) -> ModuleType:
    """Return a mutant's module: TARGET, FAULTS, and `broken`, given the function it replaces."""
    return importlib.import_module(f"tests.mutants.{name}")


def apply(name: str) -> None:
    """Replace the mutant's function in this process.

    Raises:
        AttributeError: there is no such function any more; the mutant tests nothing.
    """
    owner, last = _found(module(name).TARGET)
    setattr(owner, last, module(name).broken(getattr(owner, last)))


def check(name: str) -> None:
    """Raise AttributeError when the function that a mutant replaces is gone."""
    owner, last = _found(module(name).TARGET)
    assert callable(getattr(owner, last))


def _found(target: str) -> tuple[Any, str]:
    place, _, path = target.partition(":")
    owner: Any = importlib.import_module(place)
    *outer, last = path.split(".")
    for each in outer:
        owner = getattr(owner, each)
    return owner, last
