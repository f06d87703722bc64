"""`outbox listen` and `outbox run`: the application's own listeners and relays."""

import argparse
import importlib
import inspect
import sys
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from outbox.cli import observing, options
from outbox.cli.running import connect
from outbox.cli.stopping import serve, signals
from outbox.errors import ConfigurationError
from outbox.jetstream.client import JetStreamClient
from outbox.lifecycle import Worker
from outbox.listener import Listener
from outbox.relay import Relay
from outbox.settings import Settings


async def listen(settings: Settings, given: argparse.Namespace) -> int:
    """Run listeners, and a relay for what their handlers add."""
    found = {name: _found(name) for name in given.objects}
    sessions = sum(each.concurrency for each in found.values() if _is_listener(each))
    engine = options.engine(settings, "outbox listen", sessions=sessions)
    client = JetStreamClient.from_settings(settings, name="outbox-listen")
    try:
        with signals() as asked:
            async with AsyncExitStack() as stack:
                observing.instrument()
                metrics = observing.observer(settings)
                arguments: dict[str, Any] = {"settings": settings}
                arguments |= {} if metrics is None else {"observer": metrics}
                workers: list[Worker] = []
                for name, each in found.items():
                    made = each if _is_listener(each) else await _made(each, stack)
                    if _is_listener(made):
                        workers.append(_listener(made, name, client, engine, arguments))
                    else:
                        workers += _workers(made, name)
                if not given.no_relay:
                    workers.append(Relay(engine, client, settings=settings, observer=metrics))
                async with observing.observed(workers, settings, metrics, "outbox listen"):
                    if await connect(client, asked):
                        await _create_stream(client, settings)
                        await serve(workers, settings, asked)
    finally:
        await client.close()
        await engine.dispose()
    return options.EXIT_OK


async def run(settings: Settings, given: argparse.Namespace) -> int:
    """Run the workers that the application makes by itself; it gives them their observers, too."""
    found = _found(given.object)
    with signals() as asked:
        async with AsyncExitStack() as stack:
            workers = _workers(await _made(found, stack), given.object)
            observing.instrument()
            metrics = observing.observer(settings, workers)
            async with observing.observed(workers, settings, metrics, "outbox run"):
                await serve(workers, settings, asked)
    return options.EXIT_OK


async def _made(found: Any, stack: AsyncExitStack) -> Any:
    """Return what a function or an async context manager yields; anything else as it is."""
    made = found
    if callable(made) and not isinstance(made, AbstractAsyncContextManager):
        made = made()
    if inspect.isawaitable(made):
        made = await made
    if isinstance(made, AbstractAsyncContextManager) and not isinstance(made, Worker):
        made = await stack.enter_async_context(made)
    return made


async def _create_stream(client: JetStreamClient, settings: Settings) -> None:
    """Make the stream if the settings say so: listeners start beside the relay, not after it."""
    if settings.create_stream:
        subjects = [f"{prefix}>" for prefix in settings.subject_prefixes]
        await client.ensure_stream(settings.stream, [*subjects, "dlq.>"])


def _is_listener(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Listener)


def _listener(
    made: Any,
    name: str,
    client: JetStreamClient,
    engine: AsyncEngine,
    arguments: dict[str, Any],
) -> Worker:
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    try:
        worker: Worker = made(client, sessions, **arguments)
    except TypeError as error:
        raise ConfigurationError(
            f"{name} cannot be made with (js_client, sessionmaker, "
            f"{'=…, '.join(arguments)}=…): {error}; "
            "name a function without arguments that makes it"
        ) from error
    return worker


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
