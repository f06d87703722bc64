"""What a relay says about itself."""

from dataclasses import dataclass

from typing_extensions import override

from outbox import lifecycle

NO_ACK_SECONDS = 10.0  # twice the usual deadline of a page


@dataclass(frozen=True, slots=True, kw_only=True)
class Health(lifecycle.Health):
    """Health is the age of the last ack, never "connected" alone; a standby in reach is well."""

    lane_owned: bool
    last_ack_seconds: float | None  # since the last ack
    unanswered_seconds: float | None  # since when something is to be sent and no ack comes
    rows_below_floor: int  # must be 0
    broker_outage: str | None
    database_outage: str | None

    @override
    def _hindrance(self) -> str | None:
        if self.database_outage is not None:
            return f"the database cannot be used: {self.database_outage}"
        if self.unanswered_seconds is not None and self.unanswered_seconds >= NO_ACK_SECONDS:
            return f"no ack for {self.unanswered_seconds:.0f} s"
        if self.broker_outage is not None:
            return f"the broker cannot be used: {self.broker_outage}"
        return None
