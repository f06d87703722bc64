"""The JetStream API over a plain socket, for fixtures that must not lean on the code under test."""

import json
import socket
from typing import Any
from urllib.parse import unquote, urlsplit

SUBJECTS = ("evt.>", "cmd.>", "dlq.>")
ANSWER_SECONDS = 10.0
DELETING_MAX = 100  # tries, each a round trip


def api(url: str, suffix: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the answer of `$JS.API.{suffix}`; an error in it raises."""
    where = urlsplit(url.split(",", 1)[0])
    with socket.create_connection(
        (where.hostname or "127.0.0.1", where.port or 4222), timeout=ANSWER_SECONDS
    ) as connection:
        stream = connection.makefile("rwb")
        stream.readline()  # INFO
        options: dict[str, Any] = {"verbose": False, "pedantic": False, "name": "tests"}
        if where.username is not None:
            options |= {"user": unquote(where.username), "pass": unquote(where.password or "")}
        body = json.dumps(payload).encode() if payload is not None else b""
        stream.write(
            b"CONNECT %b\r\nSUB _TESTS.answer 1\r\nPUB $JS.API.%b _TESTS.answer %d\r\n%b\r\n"
            % (json.dumps(options).encode(), suffix.encode(), len(body), body)
        )
        stream.flush()
        answer: dict[str, Any] = json.loads(_message(stream))
        stream.close()
    if "error" in answer:
        raise RuntimeError(f"$JS.API.{suffix}: {answer['error']}")
    return answer


def _message(stream: Any) -> bytes:
    while True:
        line: bytes = stream.readline()
        if line.startswith(b"MSG "):
            body: bytes = stream.read(int(line.rsplit(maxsplit=1)[-1]))
            return body
        if line.startswith(b"PING"):
            stream.write(b"PONG\r\n")
            stream.flush()
        if not line or line.startswith(b"-ERR"):
            raise RuntimeError(f"nats-server answered {line!r}")


def delete_streams(url: str) -> None:
    """Delete every stream of the account."""
    while names := api(url, "STREAM.NAMES", {}).get("streams"):
        for name in names:
            api(url, f"STREAM.DELETE.{name}")


def create_stream(url: str, name: str, **config: Any) -> None:
    """Make a stream with the recommended configuration, changed by `config`."""
    wanted: dict[str, Any] = {
        "name": name,
        "subjects": list(SUBJECTS),
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "allow_direct": True,
        "duplicate_window": 300 * 1_000_000_000,
        "num_replicas": 1,
    }
    for _ in range(DELETING_MAX):  # a stream of this name may not be wholly deleted yet
        try:
            api(url, f"STREAM.CREATE.{name}", wanted | config)
        except RuntimeError as error:
            if "error creating store" not in str(error):
                raise
        else:
            return
    raise RuntimeError(f"stream {name} cannot be created")
