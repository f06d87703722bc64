"""`outbox prune` deletes what is past its retention, and nothing else."""

import json
from datetime import timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Settings
from outbox.cli.main import main
from outbox.operate.prune import BATCH, Pruned, prune
from tests.servers.events import count

SETTINGS = Settings.defaults(inbox_retention=timedelta(days=3), archive_retention=timedelta(days=1))
INBOX = """
INSERT INTO outbox.inbox (listener, event_id, processed_at)
SELECT 'mail-x', gen_random_uuid(), now() - CAST(:age AS interval)
FROM generate_series(1, CAST(:rows AS int8))
"""
ARCHIVE = """
INSERT INTO outbox.archive (id, event_id, slot, subject, headers, body, created_at, stream,
                            sequence, published_at, day)
SELECT n, gen_random_uuid(), 0, 'evt.a', '', '', now(), 'EVENTS', n, d,
       CAST((CAST(floor(extract(epoch FROM d)) AS int8) / 86400) % 32 AS int2)
FROM generate_series(1, CAST(:rows AS int8)) AS n, (SELECT now() - CAST(:age AS interval) AS d) AS a
"""
LETTER = """
INSERT INTO outbox.dead_letter (side, event_id, subject, headers, body, reason, error, attempts,
                                failed_at)
VALUES ('relay', gen_random_uuid(), 'evt.a', '', '', 'refused', '', 1, now() - interval '1 year')
"""


@pytest.fixture
async def aged(engine: AsyncEngine) -> None:
    """Rows on both sides of their retention, more of the inbox than one batch."""
    async with engine.begin() as connection:
        old, new = timedelta(days=4), timedelta(days=2)
        await connection.execute(text(INBOX), {"age": old, "rows": BATCH + 3})
        await connection.execute(text(INBOX), {"age": new, "rows": 7})
        await connection.execute(text(ARCHIVE), {"age": old, "rows": 11})
        await connection.execute(text(ARCHIVE), {"age": timedelta(0), "rows": 5})
        await connection.execute(text(LETTER))


async def test_dry_run_counts_and_the_real_one_deletes_just_that(
    engine: AsyncEngine, aged: None
) -> None:
    del aged
    expected = Pruned(inbox=BATCH + 3, archive=11)
    assert await prune(engine, SETTINGS, dry_run=True) == expected
    assert await count(engine, "inbox") == BATCH + 10
    assert await prune(engine, SETTINGS) == expected
    assert await prune(engine, SETTINGS) == Pruned(0, 0)
    left = [await count(engine, table) for table in ("inbox", "archive", "dead_letter")]
    assert left == [7, 5, 1]


def test_command_says_how_much(
    aged: None,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del aged
    monkeypatch.setenv("OUTBOX_DATABASE_URL", database_url)
    monkeypatch.setenv("OUTBOX_INBOX_RETENTION", str(3 * 86400))
    assert main(["prune", "--dry-run"]) == 0
    said = "5,003 rows of the inbox and 11 of the archive would be deleted\n"
    assert capsys.readouterr().out == said
    assert main(["prune", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"inbox": 5003, "archive": 11}
