"""What a relay says about itself."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Health:
    """Health is the age of the last ack, never "connected" alone."""

    running: bool
    lane_owned: bool
    connected: bool
    last_ack_seconds: float | None  # since the last ack
    unanswered_seconds: float | None  # since when something is to be sent and no ack comes
    rows_below_floor: int  # must be 0
    broker_outage: str | None
    database_outage: str | None

    @property
    def ok(self) -> bool:
        """True for an active relay whose events are acked, and for a standby in reach."""
        return self.running and self.broker_outage is None and self.database_outage is None
