"""Settings: read once, checked together, secrets never shown."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.errors import ConfigurationError
from outbox.settings import SCHEMA_PATTERN, Settings, variables

SECRET = "s3cr3t-word"  # noqa: S105 - the point of the test


def test_defaults_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_STREAM", "OTHER")
    monkeypatch.setenv("OUTBOX_SCHEMA", "other")
    settings = Settings.defaults()
    assert settings.stream == "EVENTS"
    assert settings.schema_name == "outbox"


def test_the_environment_is_read_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_STREAM", "GLAM_EVENTS")
    monkeypatch.setenv("OUTBOX_SCHEMA", "events")
    settings = Settings.from_environment(stream="FLAG", nats_url=None)
    assert settings.stream == "FLAG"
    assert settings.schema_name == "events"
    assert settings.nats_url == ("nats://127.0.0.1:4222",)


def test_every_variable_reaches_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "OUTBOX_DATABASE_URL": "postgresql+asyncpg://u@h/d",
        "OUTBOX_NATS_URL": "nats://a:4222, nats://b:4222,",
        "OUTBOX_SUBJECT_PREFIXES": "evt.,cmd.,ops.",
        "OUTBOX_SCHEMA": "events",
        "OUTBOX_EVENT_BYTES_MAX": "2048",
        "OUTBOX_PAGE_ROWS_MAX": "10",
        "OUTBOX_PAGE_BYTES_MAX": "65536",
        "OUTBOX_PUBLISH_TIMEOUT": "1.5",
        "OUTBOX_POLL_INTERVAL_MAX": "0.1",
        "OUTBOX_LEASE": "4",
        "OUTBOX_GRACE": "3",
        "OUTBOX_PUBLISH_ATTEMPTS_MAX": "9",
        "OUTBOX_ARCHIVE_RETENTION": "3600",
        "OUTBOX_INBOX_RETENTION": "7200",
        "OUTBOX_CREATE_STREAM": "true",
        "OUTBOX_ON_DEAD": "park_key",
        "OUTBOX_METRICS_PORT": "9464",
    }
    texts = {name: f"value-{n}" for n, name in enumerate(variables()) if name not in values}
    for name, value in (values | texts).items():
        monkeypatch.setenv(name, value)
    settings = Settings.from_environment()
    defaults = Settings.defaults()
    assert [f for f in variables().values() if getattr(settings, f) == getattr(defaults, f)] == []
    assert settings.nats_url == ("nats://a:4222", "nats://b:4222")
    assert settings.publish_timeout == timedelta(seconds=1.5)


def test_the_archive_can_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_ARCHIVE_RETENTION", "off")
    assert Settings.from_environment().archive_retention is None


def test_an_unknown_variable_is_refused_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OUTBOX_DATABSE_URL", SECRET)
    with pytest.raises(ConfigurationError, match="did you mean OUTBOX_DATABASE_URL") as raised:
        Settings.from_environment()
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema_name": "Outbox; DROP"}, "schema_name"),
        ({"schema_name": ""}, "schema_name"),
        ({"lease": 5, "publish_timeout": 5}, "publish_timeout must be shorter than lease"),
        ({"poll_interval_max": 1}, "poll_interval_max must be at most 0.25 seconds"),
        ({"grace": 0}, "grace must be above 0 seconds"),
        ({"lease": timedelta(seconds=-1)}, "lease must be above 0 seconds"),
        ({"archive_retention": timedelta(days=31)}, "archive_retention must be within 30 days"),
        ({"archive_retention": 0}, "archive_retention must be within 30 days"),
        (
            {"inbox_retention": timedelta(hours=24)},
            "inbox_retention must be longer than archive_retention",
        ),
        ({"event_bytes_max": 10}, r"event_bytes_max \(OUTBOX_EVENT_BYTES_MAX\)"),
        ({"page_rows_max": 10_001}, r"page_rows_max \(OUTBOX_PAGE_ROWS_MAX\)"),
        ({"lease": "soon"}, r"lease \(OUTBOX_LEASE\)"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Settings.defaults(**values)


def test_secrets_are_in_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE_URL", f"postgresql+asyncpg://u:{SECRET}@h/d")
    monkeypatch.setenv("OUTBOX_NATS_PASSWORD", SECRET)
    monkeypatch.setenv("OUTBOX_NATS_TOKEN", SECRET)
    settings = Settings.from_environment()
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()}"


def test_a_secret_is_not_in_the_error_about_another_setting() -> None:
    with pytest.raises(ConfigurationError) as raised:
        Settings.defaults(nats_password=SECRET, database_url=SECRET, lease=1)
    assert SECRET not in str(raised.value)
    assert raised.value.__cause__ is None


def test_a_url_with_a_password_for_nats_is_not_shown() -> None:
    settings = Settings.defaults(nats_url=f"nats://user:{SECRET}@127.0.0.1:4222")
    assert SECRET not in repr(settings)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.defaults().stream = "OTHER"


@given(st.text(max_size=60))
def test_a_schema_name_is_an_identifier_or_refused(name: str) -> None:
    try:
        settings = Settings.defaults(schema_name=name)
    except ConfigurationError:
        assert not SCHEMA_PATTERN.fullmatch(name)
    else:
        assert SCHEMA_PATTERN.fullmatch(settings.schema_name)


def test_every_field_is_documented() -> None:
    assert all(Settings.model_fields[name].description for name in variables().values())
