"""docs/operations.md and the Grafana files are true: commands run, names exist on both sides."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from typing_extensions import override

from outbox import EventEnvelope, JetStreamClient, Listener, Relay, Settings, errors
from outbox.cli import main
from outbox.jetstream.api import ApiError
from outbox.observe.metrics import Metrics
from outbox.observe.sampling import Sample, Unread
from outbox.postgres.counting import Backlog
from outbox.settings import variables
from outbox.telemetry import Fact, FailureClass, Moment, Step

DOCS = Path(__file__).parents[2] / "docs"
OPERATIONS = (DOCS / "operations.md").read_text()
DASHBOARD = (DOCS / "grafana" / "outbox.json").read_text()
ALERTS = (DOCS / "grafana" / "alerts.yml").read_text()
PROGRAMS = {"outbox", "outbox-relay"}
NOT_OURS = {"pg_dump"}  # PostgreSQL's own; it is shown, and not run here
NAME = re.compile(r"\b((?:outbox|inbox)_[a-z_]+)\b")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", OPERATIONS, re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    return [line for line in lines if line.split()[0] not in NOT_OURS]


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_runbook_run(
    command: str, database_url: str, nats_server: str, stream: str, js_client: JetStreamClient
) -> None:
    """Each does what the page says on healthy servers: no usage error, no traceback."""
    del js_client
    assert command.split(maxsplit=1)[0] in PROGRAMS
    place = os.environ["PATH"]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{place}",
        "OUTBOX_DATABASE_URL": database_url,
        "OUTBOX_NATS_URL": nats_server,
        "OUTBOX_STREAM": stream,
    }
    checked = re.sub(r"\|\| true.*", "|| test $? -eq 1", command)
    done = subprocess.run(
        ["/bin/sh", "-e", "-c", checked],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("sql", blocks("sql"))
async def test_statements_of_the_runbook_run(sql: str, engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text(sql))


def test_every_alert_is_explained_and_every_explained_one_exists() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS)["groups"] for rule in group["rules"]]
    chapter = OPERATIONS.partition("\n## Alerts\n")[2].partition("\n## ")[0]
    assert [rule["alert"] for rule in rules] == re.findall(r"^### (\w+)$", chapter, re.MULTILINE)
    for rule in rules:
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_every_public_error_is_explained() -> None:
    public = {
        name
        for name, each in vars(errors).items()
        if isinstance(each, type) and issubclass(each, errors.OutboxError)
    }
    chapter = OPERATIONS.partition("\n## Errors\n")[2].partition("\n## ")[0]
    assert public - {"OutboxError"} | {ApiError.__name__} == set(
        re.findall(
            r"`(\w+)`(?=[,` \w]*\|)", "\n".join(re.findall(r"^\| (`.*?\|)", chapter, re.MULTILINE))
        )
    )


def test_links_within_the_page_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-")
        for head in re.findall(r"^#+ (.*)$", OPERATIONS, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", OPERATIONS)) <= anchors


def test_examples_for_kubernetes_name_what_exists() -> None:
    said = "\n".join(blocks("yaml"))
    for block in blocks("yaml"):
        assert yaml.safe_load(block)
    assert set(re.findall(r"OUTBOX_[A-Z_]+", said)) <= variables().keys()
    assert set(re.findall(r"\[outbox, (\w+)", said)) <= main._EACH.keys()


# ---- metrics ------------------------------------------------------------------------------------


class Reader(Listener):
    """Only its state is looked at."""

    subject = "evt.test.>"
    queue_group = "reader"
    service_name = "mail"

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        raise AssertionError


@pytest.fixture
def names(
    engine: AsyncEngine, sessionmaker: async_sessionmaker[AsyncSession], js_client: JetStreamClient
) -> set[str]:
    """Every series that a scrape shows once each kind of thing has happened."""
    metrics = Metrics(CollectorRegistry())
    relay = Relay(engine, js_client, settings=Settings.defaults(), observer=metrics)
    reader = Reader(js_client, sessionmaker, observer=metrics)
    metrics.watch(
        [relay, reader],
        Sample(
            backlog=Backlog(1, None, 1, {("relay", "refused"): 1}),
            unread={reader.identity: Unread(1, 0.5)},
        ),
    )
    fact = [Fact("1", "evt.a", 0.0)]
    for moment in (
        Moment(Step.SETTLED, "relay", events=fact),
        Moment(Step.FAILED, "relay", reason=FailureClass.REFUSED),
        Moment(Step.DUPLICATE, "relay"),
        Moment(Step.COMMITTED, reader.identity, events=fact),
        Moment(Step.HANDLED, reader.identity, seconds=0.1),
        Moment(Step.GAP, reader.identity),
    ):
        metrics.on_step(moment)
    found = {sample.name for family in metrics.collect() for sample in family.samples}
    return found | {"outbox_last_ack_age_seconds"}  # only after an ack; test_metrics.py shows it


def used(source: str) -> set[str]:
    expressions: list[str] = []

    def walk(found: Any) -> None:
        if isinstance(found, dict):
            expressions.extend(str(found[name]) for name in ("expr", "query") if name in found)
            for each in found.values():
                walk(each)
        elif isinstance(found, list):
            for each in found:
                walk(each)

    walk(json.loads(source) if source.startswith("{") else yaml.safe_load(source))
    return {name for each in expressions for name in NAME.findall(each)}


async def test_dashboard_and_alerts_use_series_that_exist(names: set[str]) -> None:
    assert used(DASHBOARD) <= names
    assert used(ALERTS) <= names


async def test_every_metric_is_on_the_dashboard(names: set[str]) -> None:
    shown = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in used(DASHBOARD)}
    assert {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in names} == shown


def test_expressions_are_closed() -> None:
    for source in (DASHBOARD, ALERTS):
        for opened, closed in ("()", "{}", "[]"):
            assert source.count(opened) == source.count(closed)
