"""Metrics for Prometheus (extra `metrics`): an observer that counts, and a collector that shows.

Steps are counted in plain dictionaries, because a relay tells of tens of thousands of events a
second; they become metrics when somebody scrapes. Every label has a bounded set of values.
"""

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from typing_extensions import override

from outbox.envelope import Malformed
from outbox.lifecycle import Worker
from outbox.listener.dead import DeadReason as ListenersReason
from outbox.observe.sampling import Sample
from outbox.relay import Relay
from outbox.relay.verdict import DeadReason as RelaysReason
from outbox.telemetry import Moment, Observer, Step

OTHER = "other"
REASONS = frozenset({*map(str, RelaysReason), *map(str, ListenersReason), *map(str, Malformed)})
ROOTS_MAX = 20  # subject roots told apart, in the order of their coming
DELAYS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
RELAY = "relay"
OUTCOMES = {
    Step.COMMITTED: "handled",
    Step.DUPLICATE: "duplicate",
    Step.RETRIED: "retried",
    Step.DEAD_LETTERED: "dead_lettered",
}


@dataclass(slots=True)
class Histogram:
    """How many values fell below each bound."""

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)  # one more than bounds
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value, in seconds; clocks of two hosts may make it negative."""
        value = max(value, 0.0)
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return the cumulated counts, as Prometheus wants them."""
        found, below = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            below += count
            found.append(("+Inf" if bound == float("inf") else repr(bound), float(below)))
        return found


class Metrics(Observer, Collector):
    """Counts what relays and listeners of this process tell; give it to each as `observer`.

    Args:
        registry: takes the metrics; the process's own by default.
    """

    wants_events: ClassVar[bool] = True

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.published: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()
        self.handled: Counter[tuple[str, str]] = Counter()
        self.gaps: Counter[str] = Counter()
        self.repaired = 0
        self.publish_delay = Histogram(DELAYS)
        self.handle_seconds: dict[str, Histogram] = defaultdict(lambda: Histogram(SECONDS))
        self.delivery_delay: dict[str, Histogram] = defaultdict(lambda: Histogram(DELAYS))
        self._workers: Sequence[Worker] = ()
        self._sample = Sample()
        self._registry = registry
        registry.register(self)

    def watch(self, workers: Sequence[Worker], sample: Sample) -> None:
        """Show the state of `workers`, and what is sampled, from now on."""
        self._workers, self._sample = workers, sample

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering collects nothing: it is too early to ask."""
        return []

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return the whole registry as a scrape that takes `accept` wants it, and its type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    # ---- counting ---------------------------------------------------------------------------

    @override
    def on_step(self, moment: Moment) -> None:
        if moment.source == RELAY:
            self._relay(moment)
        else:
            self._listener(moment)

    def _relay(self, moment: Moment) -> None:
        match moment.step:
            case Step.SETTLED:
                self._settled(moment)
            case Step.FAILED:
                self.failures[str(moment.reason)] += moment.count
            case Step.DUPLICATE:
                self.duplicates[RELAY] += moment.count
            case Step.REPAIRED:
                self.repaired += moment.count
            case _:
                return

    def _settled(self, moment: Moment) -> None:
        now = time.time()
        for event in moment.events:
            root = event.subject.partition(".")[0]
            if root not in self.published and len(self.published) >= ROOTS_MAX:
                root = OTHER
            self.published[root] += 1
            if event.added_at is not None:
                self.publish_delay.observe(now - event.added_at)

    def _listener(self, moment: Moment) -> None:
        step, name = moment.step, moment.source
        outcome = OUTCOMES.get(step)
        if outcome is not None:
            if step is Step.DEAD_LETTERED and moment.reason == ListenersReason.DISCARDED:
                outcome = "discarded"
            self.handled[name, outcome] += moment.count
        match step:
            case Step.DUPLICATE:
                self.duplicates["listener"] += moment.count
            case Step.HANDLED if moment.seconds is not None:
                self.handle_seconds[name].observe(moment.seconds)
            case Step.COMMITTED:
                now = time.time()
                for event in moment.events:
                    if event.added_at is not None:
                        self.delivery_delay[name].observe(now - event.added_at)
            case Step.GAP:
                self.gaps[name] += moment.count
            case _:
                return

    # ---- showing ----------------------------------------------------------------------------

    @override
    def collect(self) -> Iterator[Metric]:
        """Yield every metric as of now; asks nobody. Any thread may call it, hence the copies."""
        yield from self._of_tables()
        yield from self._of_relays()
        yield from self._of_listeners()

    def _of_tables(self) -> Iterator[Metric]:
        backlog = self._sample.backlog
        if backlog is None:
            return
        yield GaugeMetricFamily(
            "outbox_pending_events", "Events that are to be published now.", backlog.pending
        )
        age = 0.0 if backlog.oldest is None else backlog.oldest.total_seconds()
        yield GaugeMetricFamily(
            "outbox_oldest_pending_age_seconds", "Age of the oldest of them.", age
        )
        yield GaugeMetricFamily(
            "outbox_scheduled_events", "Events whose time has not come.", backlog.scheduled
        )
        letters: Counter[tuple[str, str]] = Counter()
        for (side, reason), number in backlog.dead_letters.items():
            letters[side, reason if reason in REASONS else OTHER] += number
        yield _labelled(
            GaugeMetricFamily,
            "outbox_dead_letters",
            "Open dead letters.",
            ("side", "reason"),
            letters,
        )

    def _of_relays(self) -> Iterator[Metric]:
        relays = [worker for worker in self._workers if isinstance(worker, Relay)]
        states = [relay.health() for relay in relays]
        if states:
            owned = sum(state.lane_owned for state in states)
            yield GaugeMetricFamily("outbox_lanes_owned", "Lanes that are held here.", owned)
            below = sum(state.rows_below_floor for state in states)
            yield GaugeMetricFamily(
                "outbox_rows_below_floor", "Rows found below the relay's floor; must be 0.", below
            )
        acks = [state.last_ack_seconds for state in states if state.last_ack_seconds is not None]
        if acks:
            yield GaugeMetricFamily(
                "outbox_last_ack_age_seconds", "Time since the broker's last ack.", min(acks)
            )
        yield _labelled(
            CounterMetricFamily,
            "outbox_published_events",
            "Events that have left the outbox, by the first token of their subject.",
            ("subject_root",),
            {(root,): number for root, number in list(self.published.items())},
        )
        yield _labelled(
            CounterMetricFamily,
            "outbox_publish_failures",
            "Tries to publish an event that failed, by whose fault it is.",
            ("class",),
            {(name,): number for name, number in list(self.failures.items())},
        )
        yield CounterMetricFamily(
            "outbox_repaired_events", "Events that the broker had lost.", self.repaired
        )
        delay = HistogramMetricFamily(
            "outbox_publish_delay_seconds", "From `add` until the event has left the outbox."
        )
        delay.add_metric((), self.publish_delay.buckets(), self.publish_delay.total)
        yield delay

    def _of_listeners(self) -> Iterator[Metric]:
        if self._workers:
            connected = all(worker.health().connected for worker in self._workers)
            yield GaugeMetricFamily(
                "outbox_broker_connected", "1 while every worker is connected.", int(connected)
            )
        yield _labelled(
            CounterMetricFamily,
            "outbox_duplicates",
            "Events that the stream, or an inbox, knew already.",
            ("side",),
            {(side,): number for side, number in list(self.duplicates.items())},
        )
        yield _labelled(
            CounterMetricFamily,
            "inbox_handled_events",
            "Deliveries by what became of them.",
            ("listener", "outcome"),
            self.handled,
        )
        yield _labelled(
            CounterMetricFamily,
            "inbox_gap_events",
            "Messages that the stream dropped unread, at most.",
            ("listener",),
            {(name,): number for name, number in list(self.gaps.items())},
        )
        for name, text, found in (
            ("inbox_handle_seconds", "How long the handler ran.", self.handle_seconds),
            ("inbox_delivery_delay_seconds", "From `add` until COMMIT.", self.delivery_delay),
        ):
            family = HistogramMetricFamily(name, text, labels=("listener",))
            for listener, histogram in list(found.items()):
                family.add_metric((listener,), histogram.buckets(), histogram.total)
            yield family
        unread = self._sample.unread
        for name, text, values in (
            (
                "inbox_unread_events",
                "Messages of the stream that the listener has not acked.",
                {(listener,): each.messages for listener, each in unread.items()},
            ),
            (
                "inbox_unread_retention_ratio",
                "Share of the stream's limits that the oldest of them has used; at 1 it is lost.",
                {(listener,): each.retention_ratio for listener, each in unread.items()},
            ),
        ):
            yield _labelled(GaugeMetricFamily, name, text, ("listener",), values)


def _labelled(kind: Any, name: str, text: str, labels: Sequence[str], values: Any) -> Metric:
    family = kind(name, text, labels=labels)
    for label_values, value in sorted(values.items()):
        family.add_metric(label_values, value)
    metric: Metric = family
    return metric
