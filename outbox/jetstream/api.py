"""What speaks the JetStream API in raw JSON, and the error it answers with."""

from collections.abc import Mapping
from typing import Any, Protocol

from outbox.errors import OutboxError


class ApiError(OutboxError):
    """JetStream refused a request; nothing was changed.

    `code` is the HTTP-like class, `err_code` the exact reason (for example 10059, no such stream).
    """

    def __init__(self, code: int, err_code: int, description: str) -> None:
        super().__init__(f"JetStream answered {code}/{err_code}: {description}")
        self.code = code
        self.err_code = err_code
        self.description = description


class Api(Protocol):
    """What provisioning needs of a client."""

    async def api(self, suffix: str, payload: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON answer of `$JS.API.{suffix}`."""
