"""Who we are to the broker: TLS, user, token, nkey or credentials file, never shown in a text."""

import importlib.util
import logging
import re
import ssl
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outbox.errors import ConfigurationError

log = logging.getLogger(__name__)

_USERINFO = re.compile(r"(?<=//)[^/@\s]+@")
_SEED = re.compile(r"S[A-Z][A-Z2-7]{56}")
_READABLE_BY_OTHERS = stat.S_IRGRP | stat.S_IROTH
_SHOWN_CHARACTERS_MAX = 300


@dataclass(frozen=True, slots=True)
class Credentials:
    """The security options of a connection; every secret is left out of the repr.

    `tls` is a context, the path of a CA file, or True for the system's CAs. `nkeys_seed` is a seed
    or the path of a file that holds one.
    """

    tls: ssl.SSLContext | str | Path | bool | None = None
    tls_cert: str | Path | None = None
    tls_key: str | Path | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    nkeys_seed: str | Path | None = field(default=None, repr=False)
    credentials: str | Path | None = None

    def options(self) -> dict[str, Any]:
        """Return the arguments for nats-py; files are read anew, so that they may be rotated.

        Raises:
            ConfigurationError: a file is missing, empty or unreadable, or options contradict.
        """
        options: dict[str, Any] = {}
        if (context := self._context()) is not None:
            options["tls"] = context
        for name in ("user", "password", "token"):
            if (value := getattr(self, name)) is not None:
                options[name] = value
        if self.nkeys_seed is not None:
            _need_nkeys()
            options["nkeys_seed_str"] = _seed(self.nkeys_seed)
        if self.credentials is not None:
            _need_nkeys()
            _read(Path(self.credentials), "credentials")
            options["user_credentials"] = str(self.credentials)
        return options

    def masked(self, text: str) -> str:
        """Return `text` without user names and secrets, cut to a line that a log can carry."""
        text = _USERINFO.sub("***@", text)
        seed = self.nkeys_seed if isinstance(self.nkeys_seed, str) else None
        for secret in (self.password, self.token, seed):
            if secret:
                text = text.replace(secret, "***")
        return " ".join(text.split())[:_SHOWN_CHARACTERS_MAX]

    def _context(self) -> ssl.SSLContext | None:
        if isinstance(self.tls, ssl.SSLContext):
            return self.tls
        if not self.tls and self.tls_cert is None:
            return None
        authority = self.tls if isinstance(self.tls, str | Path) else None
        for path, what in ((authority, "tls CA"), (self.tls_cert, "tls certificate")):
            if path is not None:
                _read(Path(path), what, secret=False)
        try:
            context = ssl.create_default_context(cafile=authority)
            if self.tls_cert is not None:
                context.load_cert_chain(self.tls_cert, self.tls_key)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigurationError(f"the TLS files cannot be used: {error}") from error
        return context


def _need_nkeys() -> None:
    if importlib.util.find_spec("nkeys") is None:
        raise ConfigurationError("nkeys and credentials files need: pip install 'nats-py[nkeys]'")


def _seed(given: str | Path) -> str:
    if isinstance(given, str) and _SEED.fullmatch(given.strip()):
        return given.strip()
    text = _read(Path(given), "nkey seed")
    for line in text.splitlines():
        if _SEED.fullmatch(line.strip()):
            return line.strip()
    raise ConfigurationError("the nkey seed file holds no seed (a line that begins with SU)")


def _read(path: Path, what: str, *, secret: bool = True) -> str:
    try:
        text = path.read_text()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        # The path is not shown: a mistyped seed arrives here as a path.
        raise ConfigurationError(f"the {what} file cannot be read: {reason}") from None
    if not text.strip():
        raise ConfigurationError(f"the {what} file {path} is empty")
    if secret and mode & _READABLE_BY_OTHERS:
        log.warning("a secret file can be read by others; chmod 600 it", extra={"path": str(path)})
    return text
