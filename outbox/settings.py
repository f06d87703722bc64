"""Every setting, and the only place that reads the environment.

`Settings()` reads `OUTBOX_*`; `Settings.defaults()` reads nothing. Arguments win over both.
"""

import difflib
import os
import re
from collections.abc import Iterable
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from typing_extensions import override

from outbox.errors import ConfigurationError

PREFIX = "OUTBOX_"
SCHEMA_PATTERN = re.compile(r"[a-z_][a-z0-9_]{0,47}")
_USERINFO = re.compile(r"(?://|^)[^/]*@")
ARCHIVE_DAYS_MAX = 30  # the archive's ring has 32 days: today, and one being emptied


def _commas(value: object) -> object:
    return (
        tuple(part.strip() for part in value.split(",") if part.strip())
        if isinstance(value, str)
        else value
    )


def _seconds(value: object) -> object:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Duration = Annotated[timedelta, BeforeValidator(_seconds)]
Listed = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_commas)]


class OnDead(StrEnum):
    """What becomes of the later events of a key when one of them is given up."""

    CONTINUE = "continue"  # they go on without it
    PARK_KEY = "park_key"  # they wait until a person has requeued or discarded it


class Settings(BaseSettings):
    """What operators may set. Durations are timedeltas; a number is taken as seconds."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", populate_by_name=True
    )

    database_url: SecretStr = Field(
        SecretStr(""), description="PostgreSQL, any SQLAlchemy asyncpg URL"
    )
    nats_url: Listed = Field(
        ("nats://127.0.0.1:4222",), description="NATS servers, separated by commas"
    )
    nats_user: str | None = Field(None, description="NATS user name")
    nats_password: SecretStr | None = Field(None, description="NATS password")
    nats_token: SecretStr | None = Field(None, description="NATS token")
    nats_credentials: str | None = Field(None, description="path of a NATS credentials file")
    nats_nkeys_seed: str | None = Field(None, description="path of an nkey seed file")
    nats_tls_ca: str | None = Field(None, description="path of the CA that signed the server")
    nats_tls_cert: str | None = Field(None, description="path of the client certificate")
    nats_tls_key: str | None = Field(None, description="path of the client certificate's key")
    stream: str = Field("EVENTS", description="stream that events are published to")
    source_service: str | None = Field(
        None, description="name of this service, in every envelope; up to 255 characters"
    )
    # "schema" is a method of pydantic's models, hence the other name for the attribute.
    schema_name: str = Field(
        "outbox", validation_alias="OUTBOX_SCHEMA", description="schema of the tables"
    )
    subject_prefixes: Listed = Field(
        ("evt.", "cmd."), description="what subjects of added events may begin with"
    )
    event_bytes_max: int = Field(
        1_048_576, ge=1024, le=64 * 1_048_576, description="headers and body of one event together"
    )
    page_rows_max: int = Field(
        1000, ge=1, le=10_000, description="events that the relay reads at once"
    )
    page_bytes_max: int = Field(
        8 * 1_048_576, ge=65_536, description="bytes of bodies that the relay reads at once"
    )
    publish_timeout: Duration = Field(
        timedelta(seconds=5), description="how long the relay waits for a page's acks"
    )
    poll_interval_max: Duration = Field(
        timedelta(milliseconds=250), description="longest sleep of an idle relay; at most 250 ms"
    )
    lease: Duration = Field(
        timedelta(seconds=10), description="how long a dead relay keeps its lane"
    )
    grace: Duration = Field(
        timedelta(seconds=10), description="how long a stop waits for what is in flight"
    )
    publish_attempts_max: int = Field(
        3, ge=1, le=100, description="refusals of one event before it becomes a dead letter"
    )
    on_dead: OnDead = Field(
        OnDead.CONTINUE,
        description="later events of a dead one's key: 'continue' or 'park_key' (wait behind it)",
    )
    archive_retention: Duration | None = Field(
        timedelta(hours=24),
        description="how long published events are kept; at most 30 days, 'off' deletes at once",
    )
    inbox_retention: Duration = Field(
        timedelta(days=7), description="how long event ids are remembered by listeners"
    )
    create_stream: bool = Field(
        default=False, description="create the stream at start when it is missing"
    )
    metrics_port: int | None = Field(
        None, ge=0, le=65_535, description="port of metrics and health; 0 takes a free one"
    )
    metrics_host: str = Field("0.0.0.0", description="address of that port")  # noqa: S104
    log_level: str = Field("INFO", description="level of the commands' logs")
    log_format: str = Field("console", description="'console' or 'json'")

    @classmethod
    def defaults(cls, **overrides: Any) -> "Settings":
        """Return the defaults with `overrides`; the environment is not read.

        Raises:
            ConfigurationError: an override is out of range; names the field and its variable.
        """
        return _build(_Defaults, overrides)

    @classmethod
    def from_environment(cls, **overrides: Any) -> "Settings":
        """Return the settings of `OUTBOX_*` variables; overrides that are not None win.

        Raises:
            ConfigurationError: a value is out of range, or a variable is unknown.
        """
        _refuse_unknown_variables()
        return _build(Settings, {k: v for k, v in overrides.items() if v is not None})

    @override
    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Return what `repr` shows; NATS URLs may carry a password or token before the `@`."""
        for name, value in super().__repr_args__():
            masked = tuple(_USERINFO.sub("//***@", url) for url in self.nats_url)
            yield name, masked if name == "nats_url" else value

    @field_validator("schema_name")
    @classmethod
    def _check_schema(cls, value: str) -> str:
        if not SCHEMA_PATTERN.fullmatch(value):
            raise ValueError(f"must match {SCHEMA_PATTERN.pattern}")
        return value

    @field_validator("archive_retention", mode="before")
    @classmethod
    def _read_off(cls, value: object) -> object:
        return None if isinstance(value, str) and value.lower() == "off" else value

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        zero = timedelta(0)
        for name in ("publish_timeout", "poll_interval_max", "lease", "grace", "inbox_retention"):
            if getattr(self, name) <= zero:
                raise ValueError(f"{name} must be above 0 seconds")
        if self.poll_interval_max > timedelta(milliseconds=250):
            raise ValueError("poll_interval_max must be at most 0.25 seconds")
        if self.publish_timeout >= self.lease:
            raise ValueError("publish_timeout must be shorter than lease")
        if self.archive_retention is not None:
            if not zero < self.archive_retention <= timedelta(days=ARCHIVE_DAYS_MAX):
                raise ValueError(f"archive_retention must be within {ARCHIVE_DAYS_MAX} days")
            if self.inbox_retention <= self.archive_retention:
                raise ValueError("inbox_retention must be longer than archive_retention")
        return self


class _Defaults(Settings):
    """Settings that come from their arguments alone."""

    @classmethod
    @override
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


def variables() -> dict[str, str]:
    """Return each environment variable that is read, with its field's name."""
    return {
        str(field.validation_alias or PREFIX + name.upper()): name
        for name, field in Settings.model_fields.items()
    }


def _build(kind: type[Settings], values: dict[str, Any]) -> Settings:
    try:
        return kind(**values)
    except ValidationError as error:
        problems = "; ".join(_sentence(found) for found in error.errors(include_input=False))
        raise ConfigurationError(problems) from None  # the original would show the values


def _sentence(found: Any) -> str:
    names = {name: variable for variable, name in variables().items()}
    field = str(found["loc"][0]) if found["loc"] else ""
    message = str(found["msg"]).removeprefix("Value error, ")
    return f"{field} ({names.get(field, field)}): {message}" if field else message


def _refuse_unknown_variables() -> None:
    known = variables()
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigurationError(f"{name} is not a setting{hint}")
