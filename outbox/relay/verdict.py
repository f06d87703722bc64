"""Why an event failed, and whether that is for ever."""

from dataclasses import dataclass
from enum import StrEnum

from outbox.telemetry import FailureClass


class DeadReason(StrEnum):
    """Why the relay gave an event up."""

    TOO_LARGE = "too_large"  # for the server's max_payload
    INVALID_SUBJECT = "invalid_subject"
    INVALID_HEADERS = "invalid_headers"
    REFUSED = "refused"  # by the stream, for good
    ATTEMPTS = "attempts"  # by the stream, as often as the setting allows
    ID_REUSE = "id_reuse"  # another event was published under this id
    CLOSES_CONNECTION = "closes_connection"  # the server hung up on it, sent alone, each time


OBSTACLES = {
    "size": DeadReason.TOO_LARGE,
    "subject": DeadReason.INVALID_SUBJECT,
    "headers": DeadReason.INVALID_HEADERS,
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a row that was not published."""

    error: str
    attempts: int
    counted: bool = True  # False: the stream's or subject's fault, no attempt is spent
    republished: int | None = None
    reason: DeadReason | None = None  # given up

    @property
    def failure(self) -> FailureClass:
        """Whose fault it is."""
        if self.reason is not None:
            return FailureClass.IMPOSSIBLE
        return FailureClass.REFUSED if self.counted else FailureClass.MISCONFIGURED
