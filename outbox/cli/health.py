"""`outbox health`: asks the port of a running relay or listener, for probes that run a command."""

import argparse
import asyncio
import json
import sys
import urllib.error
import urllib.request

from outbox.cli import observing, options
from outbox.errors import ConfigurationError
from outbox.settings import Settings

SECONDS = 5.0
BYTES_MAX = 1_048_576
ANY = {"", "0.0.0.0", "::"}  # noqa: S104 - addresses that a port is opened on, not asked at


def add_arguments(target: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    target.add_argument(
        "--live",
        action="store_true",
        help="whether the process is alive, not whether it can do its work",
    )
    target.add_argument("--json", action="store_true", help="print JSON")
    observing.add_port(target, "the port that is asked")


async def health(settings: Settings, given: argparse.Namespace) -> int:
    """Print why the process is not well, and return 1; 0 when it is."""
    if not settings.metrics_port:
        raise ConfigurationError("no port is given: set OUTBOX_METRICS_PORT or --metrics-port")
    path = "/healthz" if given.live else "/readyz"
    host = "127.0.0.1" if settings.metrics_host in ANY else settings.metrics_host
    url = f"http://{host}:{settings.metrics_port}{path}"
    try:
        ok, body = await asyncio.to_thread(_asked, url)
        found = json.loads(body)
        reasons = found.get("reasons", found.get("ended", []))
    except (OSError, ValueError, AttributeError) as error:
        ok, found, reasons = False, None, [f"{url} does not answer: {error}"]
    if given.json:
        print(json.dumps({"ok": ok, "reasons": reasons, "answer": found}, indent=2))
    elif ok:
        print("ok")
    else:
        print("\n".join(f"outbox: {reason}" for reason in reasons), file=sys.stderr)
    return options.EXIT_OK if ok else options.EXIT_FAILED


def _asked(url: str) -> tuple[bool, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:  # noqa: S310 - our own, http
            return True, answer.read(BYTES_MAX)
    except urllib.error.HTTPError as error:
        with error:
            return False, error.read(BYTES_MAX)
