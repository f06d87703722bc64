"""Streams and consumers are made when asked, checked always, and never overwritten."""

from datetime import timedelta
from typing import Any

import pytest

from outbox.errors import ConfigurationError
from outbox.jetstream import provisioning
from outbox.jetstream.client import JetStreamClient

SUBJECTS = ["evt.>", "cmd.>", "dlq.>"]
SECOND = 1_000_000_000


async def _ensure(client: JetStreamClient, stream: str, subject: str) -> dict[str, Any]:
    return await provisioning.ensure_consumer(
        client,
        stream=stream,
        durable="shop-mail",
        filter_subject=subject,
        ack_wait=timedelta(seconds=30),
        max_ack_pending=64,
    )


async def test_a_missing_stream_is_made_as_recommended(
    js_client: JetStreamClient, stream: str
) -> None:
    await js_client.delete_stream(stream)
    made = await js_client.ensure_stream(stream, SUBJECTS, max_msgs=1000)
    assert made.made
    config = (await js_client.get_stream_info(stream))["config"]
    expected = {
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "allow_direct": True,
        "allow_atomic": True,
        "duplicate_window": 300 * SECOND,
        "max_age": 86_400 * SECOND,
        "max_msgs": 1000,
    }
    assert expected.items() <= config.items()
    again = await js_client.ensure_stream(stream, SUBJECTS)
    assert not again.made
    assert again.drift == ()
    assert again.max_age == timedelta(hours=24)


async def test_an_existing_stream_is_left_alone_and_drift_is_told(
    js_client: JetStreamClient, stream: str
) -> None:
    before = (await js_client.get_stream_info(stream))["config"]
    facts = await js_client.ensure_stream(stream, ["evt.order.>"], max_age=timedelta(hours=1))
    assert any("max_age" in line for line in facts.drift)
    assert (await js_client.get_stream_info(stream))["config"] == before


async def test_subjects_that_the_stream_does_not_take_are_refused(
    js_client: JetStreamClient, stream: str
) -> None:
    with pytest.raises(ConfigurationError, match="nats stream edit EVENTS --subjects"):
        await provisioning.check_stream(js_client, stream, ["evt.>", "other.>"])


async def test_a_missing_stream_names_the_command(js_client: JetStreamClient, stream: str) -> None:
    assert await js_client.delete_stream(stream)
    assert not await js_client.delete_stream(stream)
    with pytest.raises(ConfigurationError, match="nats stream add EVENTS"):
        await provisioning.check_stream(js_client, stream, SUBJECTS)


async def test_streams_are_found_by_subject(js_client: JetStreamClient, stream: str) -> None:
    assert await provisioning.streams_for(js_client, "dlq.a") == [stream]
    assert await provisioning.streams_for(js_client, "nothing.a") == []


async def test_a_consumer_is_made_once(js_client: JetStreamClient, stream: str) -> None:
    made = await _ensure(js_client, stream, "evt.a")
    again = await _ensure(js_client, stream, "evt.a")
    assert made["created"] == again["created"]
    expected = {"deliver_policy": "all", "ack_policy": "explicit", "max_deliver": -1}
    assert expected.items() <= made["config"].items()
    assert made["config"]["ack_wait"] == 30 * SECOND


async def test_one_identity_on_two_subjects_is_refused_and_names_both(
    js_client: JetStreamClient, stream: str
) -> None:
    await _ensure(js_client, stream, "evt.a")
    with pytest.raises(ConfigurationError, match=r"evt\.a.*evt\.b"):
        await _ensure(js_client, stream, "evt.b")


@pytest.mark.parametrize(
    ("field", "value", "command"),
    [("max_deliver", 3, "nats consumer edit"), ("ack_policy", "all", "nats consumer rm")],
)
async def test_a_consumer_that_breaks_the_promise_is_refused(
    js_client: JetStreamClient, stream: str, field: str, value: object, command: str
) -> None:
    config = {
        "durable_name": "shop-mail",
        "filter_subject": "evt.a",
        "ack_policy": "explicit",
        field: value,
    }
    request = {"stream_name": stream, "config": config, "action": "create"}
    await js_client.api(f"CONSUMER.DURABLE.CREATE.{stream}.shop-mail", request)
    with pytest.raises(ConfigurationError, match=command):
        await _ensure(js_client, stream, "evt.a")


@pytest.mark.parametrize("name", ["", "a.b", "a b", "a*", "a>", "a\r\nb"])
async def test_names_that_would_reach_another_api_are_refused(
    js_client: JetStreamClient, name: str
) -> None:
    with pytest.raises(ConfigurationError):
        await provisioning.check_stream(js_client, name, SUBJECTS)


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("evt.>", "evt.a.b", True),
        ("evt.>", "evt.>", True),
        ("evt.>", "evt", False),
        ("evt.*", "evt.a", True),
        ("evt.*", "evt.>", False),
        ("evt.a", "evt.*", False),
        ("evt.*", "evt.*", True),
        (">", "a", True),
        ("evt.a.b", "evt.a", False),
    ],
)
def test_covers(pattern: str, subject: str, *, expected: bool) -> None:
    assert provisioning.covers(pattern, subject) is expected


def test_the_window_is_never_longer_than_the_age() -> None:
    config = provisioning.recommended_stream("A", ["a"], 0, max_age=60)
    assert config["duplicate_window"] == config["max_age"] == 60 * SECOND
    assert "allow_atomic" not in config
    assert provisioning.recommended_stream("A", ["a"], 2, max_age=0)["duplicate_window"] > 0
