"""What a listener says about itself."""

from dataclasses import dataclass

from typing_extensions import override

from outbox import lifecycle


@dataclass(frozen=True, slots=True, kw_only=True)
class Health(lifecycle.Health):
    """A listener is well while it can take messages; an idle one and a standby are."""

    prepared: bool  # schema, stream and consumer were found to fit
    in_hand: int  # messages that were taken and are not finished
    outage: str | None  # of broker or database

    @override
    def _hindrance(self) -> str | None:
        if self.outage is not None:
            return f"an outage: {self.outage}"
        return None if self.prepared else "schema, stream and consumer are not checked yet"
