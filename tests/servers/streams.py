"""Streams of tests that are not as they were made."""

from typing import Any

from outbox import JetStreamClient


async def change(client: JetStreamClient, stream: str, **changed: Any) -> None:
    """Change fields of a stream's configuration, as an operator would."""
    config = (await client.get_stream_info(stream))["config"]
    await client.api(f"STREAM.UPDATE.{stream}", config | changed)
