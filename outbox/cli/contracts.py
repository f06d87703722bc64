"""`outbox contracts`: the registered payloads, their schemas, and what a change would break."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from outbox.cli import options
from outbox.errors import ConfigurationError
from outbox.operate import schemas
from outbox.registry import registry
from outbox.settings import Settings

ACTIONS = ("list", "schema", "freeze", "check")
FROZEN = "schemas.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this command has."""
    parser.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        default=[],
        help="module that registers payloads; may be repeated",
    )
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument(
        "target",
        nargs="?",
        metavar="SUBJECT|FILE",
        help=f"of `schema`: a subject; of `freeze`: the file to write (default: {FROZEN}), "
        "- for stdout; of `check`: the older file",
    )


async def contracts(settings: Settings, given: argparse.Namespace) -> int:
    """Do one of the actions on what the modules have registered."""
    del settings
    _import(given.modules)
    actions: dict[str, Callable[[str | None], int]] = {
        "list": _list,
        "schema": _schema,
        "freeze": _freeze,
        "check": _check,
    }
    return actions[given.action](given.target)


def _import(modules: list[str]) -> None:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigurationError(f"--import {name}: {error}") from error
    if not len(registry):
        raise ConfigurationError("no payload is registered: name the module with --import MODULE")


def _list(target: str | None) -> int:
    _refuse(target, "list")
    width = max(len(each.subject) for each in registry)
    names = max(len(each.payload.__name__) for each in registry)
    for each in registry:
        later = f"  deprecated by {each.deprecated_by}" if each.deprecated_by else ""
        print(f"{each.subject:<{width}}  {each.payload.__name__:<{names}}{later}".rstrip())
    return options.EXIT_OK


def _schema(target: str | None) -> int:
    known = registry.of(target or "")
    if known is None:
        raise ConfigurationError(f"no payload is registered for {target!r}; see `list`")
    print(_text(known.payload.model_json_schema()))
    return options.EXIT_OK


def _freeze(target: str | None) -> int:
    frozen = _text(schemas.freeze(registry))
    if target == "-":
        print(frozen)
        return options.EXIT_OK
    path = Path(target or FROZEN)
    try:
        path.write_text(f"{frozen}\n", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error
    print(f"{path}: {len(registry)} subjects")
    return options.EXIT_OK


def _check(target: str | None) -> int:
    if target is None:
        raise ConfigurationError("check needs the file that `freeze` wrote")
    try:
        found = schemas.changes(_read(Path(target)), schemas.freeze(registry))
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{target} is not what `freeze` writes: {error}") from error
    breaks = [each for each in found if each.breaks]
    for each in sorted(found, key=lambda change: not change.breaks):
        print(f"{'BREAK' if each.breaks else 'note '}  {each}")
    if breaks:
        print(f"breaking changes since {target}: {len(breaks)}")
        return options.EXIT_FAILED
    print(f"no breaking change since {target}")
    return options.EXIT_OK


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error


def _refuse(target: str | None, action: str) -> None:
    if target is not None:
        raise ConfigurationError(f"{action} takes no {target!r}")


def _text(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True)
