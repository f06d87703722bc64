"""Triggers in the run's databases that see every row come, move and go, whoever does it.

They judge nothing but what one statement shows by itself; a view per invariant judges the rest from
what they noted, one line for each transaction and row.
"""

from collections.abc import Sequence

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

RETENTION = "interval '7 days'"  # of inbox and archive: what the processes' settings have
# Where an event is, by the id of its row in the outbox, which it keeps.
_PLACES = """
CREATE TABLE moved (xid xid8 NOT NULL DEFAULT pg_current_xact_id(), id bigint NOT NULL,
                    place text NOT NULL, came boolean NOT NULL, reason text, event_id uuid NOT NULL,
                    writer text NOT NULL DEFAULT current_setting('application_name'));
CREATE TABLE letter (xid xid8 NOT NULL DEFAULT pg_current_xact_id(), id bigint NOT NULL,
                     change text NOT NULL, side text NOT NULL,
                     writer text NOT NULL DEFAULT current_setting('application_name'));
CREATE TABLE act (xid xid8 NOT NULL DEFAULT pg_current_xact_id(), id bigint NOT NULL,
                  action text NOT NULL, by text NOT NULL);
CREATE TABLE violation (invariant text NOT NULL, what text NOT NULL)
"""
_NOTES = """
CREATE FUNCTION note_place() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'DELETE' THEN
    INSERT INTO moved (id, place, came, event_id) VALUES (OLD.id, TG_ARGV[0], false, OLD.event_id);
  ELSE
    INSERT INTO moved (id, place, came, event_id, reason)
    VALUES (NEW.id, TG_ARGV[0], true, NEW.event_id, to_jsonb(NEW) ->> 'reason');
  END IF;
  RETURN NULL;
END $$;
CREATE FUNCTION note_letter() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'INSERT' THEN
    IF NEW.side = 'relay' THEN
      INSERT INTO moved (id, place, came, event_id, reason)
      VALUES (NEW.position, 'dead', true, NEW.event_id, NEW.reason);
    END IF;
    INSERT INTO letter (id, change, side) VALUES (NEW.id, 'new>' || NEW.state, NEW.side);
  ELSIF NEW.state <> OLD.state THEN
    INSERT INTO letter (id, change, side)
    VALUES (NEW.id, OLD.state || '>' || NEW.state, NEW.side);
  END IF;
  RETURN NULL;
END $$;
CREATE FUNCTION note_act() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO act (id, action, by) VALUES (NEW.dead_letter_id, NEW.action, NEW."by");
  RETURN NULL;
END $$
"""
# S9: what decides about a row is written by the owner of the lane alone. The relays' connections
# carry their pid, and so does the owner's name.
_JUDGES = f"""
CREATE FUNCTION judge_owner() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE owner text;
BEGIN
  SELECT split_part(owner_name, ':', 2) INTO owner FROM outbox.lane WHERE lane = 0;
  IF current_setting('application_name') LIKE 'relay-%'
     AND owner IS DISTINCT FROM split_part(current_setting('application_name'), '-', 2) THEN
    INSERT INTO violation VALUES ('S9 written without the lease',
      TG_TABLE_NAME || ' written by ' || current_setting('application_name')
      || ' while the lane was of ' || coalesce(owner, 'nobody'));
  END IF;
  RETURN NULL;
END $$;
CREATE FUNCTION judge_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO violation VALUES ('S10 moved as it may not', 'a row of ' || TG_TABLE_NAME
    || ' was changed by ' || current_setting('application_name'));
  RETURN NULL;
END $$;
CREATE FUNCTION judge_pruning() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF OLD.processed_at > now() - {RETENTION} THEN
    INSERT INTO violation VALUES ('S15 deleted too early', OLD.listener || ' ' || OLD.event_id
      || ' of ' || OLD.processed_at || ' by ' || current_setting('application_name'));
  END IF;
  RETURN NULL;
END $$;
CREATE FUNCTION judge_emptying() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE youngest timestamptz := 'infinity';
BEGIN
  IF TG_TABLE_NAME LIKE 'archive%' THEN
    EXECUTE format('SELECT max(published_at) FROM %I.%I', TG_TABLE_SCHEMA, TG_TABLE_NAME)
      INTO youngest;
  END IF;
  IF youngest > now() - {RETENTION} THEN
    INSERT INTO violation VALUES ('S15 deleted too early', TG_TABLE_NAME || ' was emptied by '
      || current_setting('application_name'));
  END IF;
  RETURN NULL;
END $$
"""
_TRIGGERS = """
CREATE TRIGGER place AFTER INSERT OR DELETE ON outbox.pending FOR EACH ROW
  EXECUTE FUNCTION note_place('pending');
CREATE TRIGGER place AFTER INSERT OR DELETE ON outbox.waiting FOR EACH ROW
  EXECUTE FUNCTION note_place('waiting');
CREATE TRIGGER place AFTER INSERT OR DELETE ON outbox.archive FOR EACH ROW
  EXECUTE FUNCTION note_place('archive');
CREATE TRIGGER letter AFTER INSERT OR UPDATE ON outbox.dead_letter FOR EACH ROW
  EXECUTE FUNCTION note_letter();
CREATE TRIGGER act AFTER INSERT ON outbox.dead_letter_action FOR EACH ROW
  EXECUTE FUNCTION note_act();
CREATE TRIGGER owner AFTER INSERT ON outbox.waiting FOR EACH ROW EXECUTE FUNCTION judge_owner();
CREATE TRIGGER owner AFTER INSERT ON outbox.archive FOR EACH ROW EXECUTE FUNCTION judge_owner();
CREATE TRIGGER owner AFTER INSERT ON outbox.dead_letter FOR EACH ROW
  WHEN (NEW.side = 'relay') EXECUTE FUNCTION judge_owner();
CREATE TRIGGER change AFTER UPDATE ON outbox.pending FOR EACH ROW
  EXECUTE FUNCTION judge_change();
CREATE TRIGGER change AFTER UPDATE ON outbox.archive FOR EACH ROW
  EXECUTE FUNCTION judge_change();
CREATE TRIGGER change AFTER UPDATE ON outbox.waiting FOR EACH ROW
  WHEN ((OLD.id, OLD.event_id, OLD.key, OLD.subject, OLD.headers, OLD.body)
        IS DISTINCT FROM (NEW.id, NEW.event_id, NEW.key, NEW.subject, NEW.headers, NEW.body))
  EXECUTE FUNCTION judge_change();
CREATE TRIGGER change AFTER DELETE ON outbox.dead_letter FOR EACH ROW
  EXECUTE FUNCTION judge_change();
CREATE TRIGGER pruning AFTER DELETE ON outbox.inbox FOR EACH ROW EXECUTE FUNCTION judge_pruning()
"""
_EMPTYING = "CREATE TRIGGER emptying BEFORE TRUNCATE ON {} EXECUTE FUNCTION judge_emptying()"
_LEAVES = """
SELECT CAST(CAST(inhrelid AS regclass) AS text) FROM pg_inherits
WHERE inhparent = CAST('outbox.archive' AS regclass)
"""
# S10, S15: where a row of one id may go in one transaction, and by whose hand.
_MOVES = """
CREATE VIEW illegal AS
SELECT CASE WHEN gone <> '' AND came = '' AND gone <> 'archive' THEN 'S15 deleted too early'
            ELSE 'S10 moved as it may not' END AS invariant,
       format('%s: [%s] to [%s] %s by %s', id, gone, came, reason, writer) AS what
FROM (
  SELECT xid, id, min(writer) AS writer, coalesce(max(reason), '') AS reason,
         coalesce(string_agg(place, ' ' ORDER BY place) FILTER (WHERE NOT came), '') AS gone,
         coalesce(string_agg(place, ' ' ORDER BY place) FILTER (WHERE came), '') AS came
  FROM moved GROUP BY xid, id
) AS m
WHERE NOT CASE
  WHEN writer LIKE 'relay-%' THEN
    gone IN ('pending', 'waiting') AND came IN ('archive', 'dead')
    OR gone = 'pending' AND came = 'waiting' AND reason IN ('failed', 'blocked', 'scheduled')
    OR gone = 'archive' AND came = 'waiting' AND reason = 'repaired'
  WHEN writer LIKE 'app-%' OR writer LIKE 'listener-%' THEN gone = '' AND came = 'pending'
  ELSE gone = '' AND came = 'waiting' AND reason IN ('requeued', 'replayed')
END
"""
# S14: whoever changes what becomes of a dead letter leaves a line of it in the same transaction.
_CHANGES = """
CREATE VIEW unaudited AS
SELECT 'S14 a dead letter changed unaudited' AS invariant,
       format('%s %s by %s, audited: %s by %s', coalesce(l.id, a.id), l.change, l.writer,
              a.action, a.by) AS what
FROM (SELECT * FROM letter WHERE change <> 'new>open') AS l
FULL JOIN act AS a ON a.xid = l.xid AND a.id = l.id
WHERE (l.change, a.action) NOT IN (
    ('open>requeued', 'requeued'), ('new>requeued', 'requeued'), ('open>discarded', 'discarded'),
    ('requeued>handled', 'handled'), ('requeued>open', 'failed'))
  OR l.id IS NULL OR a.id IS NULL OR a.by = ''
  OR (l.change LIKE 'requeued>%') <> (l.writer LIKE 'listener-%')
"""
SCRIPT = f"{_PLACES};{_NOTES};{_JUDGES};{_TRIGGERS};{_MOVES};{_CHANGES}"


async def install(engine: AsyncEngine) -> None:
    """Put every trigger in its place."""
    async with engine.begin() as connection:
        for each in statements(SCRIPT):
            await connection.exec_driver_sql(each)
        leaves = (await connection.execute(text(_LEAVES))).scalars().all()
        for table in ("outbox.pending", "outbox.waiting", "outbox.inbox", *leaves):
            await connection.exec_driver_sql(_EMPTYING.format(table))


async def seen(engine: AsyncEngine) -> Sequence[tuple[str, str]]:
    """Return what was violated: the invariant, and what happened."""
    found = "SELECT * FROM violation UNION ALL TABLE illegal UNION ALL TABLE unaudited"
    async with engine.connect() as connection:
        return [(row[0], row[1]) for row in await connection.execute(text(found))]


async def sent_again(engine: AsyncEngine, reason: str) -> set[str]:
    """Return the events that came into `waiting` for a reason."""
    found = text("SELECT event_id FROM moved WHERE place = 'waiting' AND reason = :reason")
    async with engine.connect() as connection:
        return {str(row[0]) for row in await connection.execute(found, {"reason": reason})}


def statements(sql: str) -> list[str]:
    """Cut a script at its semicolons, but for those in a function's body."""
    parts = sql.split("$$")
    joined = "$$".join(
        part if number % 2 == 0 else part.replace(";", "\0") for number, part in enumerate(parts)
    )
    return [each.replace("\0", ";") for each in joined.split(";") if each.strip()]
