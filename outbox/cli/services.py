"""`outbox listen` and `outbox run`: the application's own listeners and relays."""

import argparse
import importlib
import inspect
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from outbox.cli import options
from outbox.cli.running import connect
from outbox.cli.stopping import serve, signals
from outbox.errors import ConfigurationError
from outbox.jetstream.client import JetStreamClient
from outbox.lifecycle import Worker
from outbox.relay import Relay
from outbox.settings import Settings


async def listen(settings: Settings, given: argparse.Namespace) -> int:
    """Run listener classes, and a relay for what their handlers add."""
    classes = [_found(name) for name in given.objects]
    engine = options.engine(settings, "outbox listen")
    client = JetStreamClient.from_settings(settings, name="outbox-listen")
    try:
        with signals() as asked:
            if await connect(client, asked):
                workers = _listeners(classes, given.objects, client, engine, settings)
                if not given.no_relay:
                    workers.append(Relay(engine, client, settings=settings))
                await serve(workers, settings, asked)
    finally:
        await client.close()
        await engine.dispose()
    return options.EXIT_OK


async def run(settings: Settings, given: argparse.Namespace) -> int:
    """Run the workers that the application makes by itself."""
    made = _found(given.object)
    with signals() as asked:
        async with AsyncExitStack() as stack:
            if callable(made) and not isinstance(made, AbstractAsyncContextManager):
                made = made()
            if inspect.isawaitable(made):
                made = await made
            if isinstance(made, AbstractAsyncContextManager) and not isinstance(made, Worker):
                made = await stack.enter_async_context(made)
            await serve(_workers(made, given.object), settings, asked)
    return options.EXIT_OK


def _listeners(
    classes: Sequence[Any],
    names: Sequence[str],
    client: JetStreamClient,
    engine: AsyncEngine,
    settings: Settings,
) -> list[Worker]:
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    workers: list[Worker] = []
    for made, name in zip(classes, names, strict=True):
        if not (isinstance(made, type) and issubclass(made, Worker)) or made is Relay:
            raise ConfigurationError(f"{name} is not a listener class")
        try:
            workers.append(made(client, sessions, settings=settings))  # type: ignore[call-arg, arg-type]
        except TypeError as error:
            raise ConfigurationError(
                f"{name} cannot be made with (js_client, sessionmaker, settings=…): {error}; "
                "use `outbox run` with a function that makes it"
            ) from error
    return workers


def _workers(made: object, name: str) -> list[Worker]:
    if isinstance(made, Worker):
        return [made]
    workers = list(made) if isinstance(made, Iterable) else []
    if not workers or not all(isinstance(worker, Worker) for worker in workers):
        raise ConfigurationError(
            f"{name} is not an iterable of relays and listeners, nor a function or an async "
            "context manager without arguments that yields one"
        )
    return workers


def _found(name: str) -> Any:
    """Return the object of `module:object`; the working directory is searched too."""
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise ConfigurationError(f"{name!r} must be MODULE:OBJECT, for example app.events:Mail")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{name} cannot be loaded: {error}") from error
    return found
