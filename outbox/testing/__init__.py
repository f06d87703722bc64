"""A kit for the tests of services that use the library.

`added` and `pending` show what a transaction holds and what was committed, `deliver` runs a handler
on the real path without a broker, `published` waits for an event on the stream, and `fail_at` and
`redeliver` make the faults that a handler must stand.
`pytest_plugins = ["outbox.testing.fixtures"]` brings real servers, with a database and a stream for
each test. See docs/testing.md.
"""

from outbox.testing.delivering import Outcome, Result, deliver
from outbox.testing.events import added, pending
from outbox.testing.faults import InjectedFault, fail_at
from outbox.testing.streams import published, redeliver

__all__ = [
    "InjectedFault",
    "Outcome",
    "Result",
    "added",
    "deliver",
    "fail_at",
    "pending",
    "published",
    "redeliver",
]
