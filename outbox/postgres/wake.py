"""How a relay learns that something was committed; every way is a hint, polling finds the rest."""

import threading
import zlib
from collections.abc import Callable

_subscribers: tuple[Callable[[], None], ...] = ()
_lock = threading.Lock()


def subscribe(callback: Callable[[], None]) -> Callable[[], None]:
    """Have `callback` called when this process committed events; return what ends that.

    It is called in the committing thread, perhaps inside an event loop, so it must be quick and
    safe to call from any thread (`loop.call_soon_threadsafe(event.set)`).
    """
    global _subscribers  # noqa: PLW0603 - one list for the process
    with _lock:
        _subscribers = (*_subscribers, callback)

    def unsubscribe() -> None:
        global _subscribers  # noqa: PLW0603 - as above
        with _lock:
            _subscribers = tuple(each for each in _subscribers if each is not callback)

    return unsubscribe


def notify_local() -> None:
    """Tell the relays of this process that events were committed; safe from any thread."""
    for callback in _subscribers:
        callback()


def channel(schema: str) -> str:
    """Return the NOTIFY channel of the tables in `schema`."""
    return f"{schema}_wake"


def gate(schema: str) -> tuple[int, int]:
    """Return the advisory lock (two int4) that lets one transaction at a time carry the NOTIFY.

    NOTIFY takes a cluster-wide lock over the commit's flush, so it must not be in each commit.
    """
    return (_int4(f"outbox.wake.{schema}"), _int4(f"{schema}.wake.outbox"))


def _int4(text: str) -> int:
    number = zlib.crc32(text.encode())
    return number - 2**32 if number >= 2**31 else number
