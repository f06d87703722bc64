"""What a relay says about itself."""

from dataclasses import dataclass

NO_ACK_SECONDS = 10.0  # twice the usual deadline of a page


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
        return self.running and self.problem is None

    @property
    def problem(self) -> str | None:
        """What is wrong, in a few words; None when all is well."""
        if self.database_outage is not None:
            return f"the database cannot be used: {self.database_outage}"
        if self.unanswered_seconds is not None and self.unanswered_seconds >= NO_ACK_SECONDS:
            return f"no ack for {self.unanswered_seconds:.0f} s"
        if self.broker_outage is not None:
            return f"the broker cannot be used: {self.broker_outage}"
        return None
