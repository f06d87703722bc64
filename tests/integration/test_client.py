"""The connection comes up, says who we are, survives the broker, and never shows a secret."""

import asyncio
import base64
import json
import os
import ssl
from datetime import timedelta
from pathlib import Path

import nkeys
import pytest

from outbox.embedded import EmbeddedNats
from outbox.errors import BrokerUnavailable, ConfigurationError
from outbox.jetstream.client import ApiError, JetStreamClient
from outbox.settings import Settings
from tests.servers.ports import free_port

TLS = Path(__file__).parent.parent / "servers" / "tls"
SOON = timedelta(seconds=2)
LATER = timedelta(seconds=20)


async def _answers(client: JetStreamClient) -> bool:
    return "type" in await client.api("INFO")


async def test_a_connection_answers_and_tells_its_limits(js_client: JetStreamClient) -> None:
    assert js_client.is_connected
    assert js_client.generation == 1
    assert js_client.max_payload >= 1024
    assert await _answers(js_client)


async def test_a_missing_server_is_unavailable_and_no_secret_is_shown() -> None:
    url = f"nats://merchant:hunter2@127.0.0.1:{free_port()}"
    client = JetStreamClient(url, token="s3cret", connect_timeout=SOON)  # noqa: S106
    with pytest.raises(BrokerUnavailable) as caught:
        await client.connect()
    shown = str(caught.value) + repr(client) + repr(client._credentials)
    assert "127.0.0.1" in shown
    for secret in ("merchant", "hunter2", "s3cret"):
        assert secret not in shown
    assert not client.is_connected
    await client.close()


async def test_no_servers_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError):
        await JetStreamClient().connect()


async def test_requests_fail_at_once_while_the_server_is_down_and_work_after(
    private_nats: EmbeddedNats,
) -> None:
    async with JetStreamClient(private_nats.url) as client:
        down, changes = asyncio.Event(), 0

        def changed() -> None:
            nonlocal changes
            changes += 1
            if not client.is_connected:
                down.set()

        unsubscribe = client.on_change(changed)
        await asyncio.to_thread(private_nats.kill)
        async with asyncio.timeout(10):
            await down.wait()
        with pytest.raises(BrokerUnavailable):
            await client.api("INFO")
        await asyncio.to_thread(private_nats.start)
        assert await client.ready(LATER)
        assert client.generation == 3  # connected, disconnected, connected
        assert changes == 2
        assert await _answers(client)
        unsubscribe()


async def test_a_connection_that_the_server_closed_for_good_is_rebuilt(nats_server: str) -> None:
    async with JetStreamClient(nats_server) as client:
        first, rebuilt = client.client, asyncio.Event()
        client.on_change(lambda: rebuilt.set() if client.generation == 3 else None)
        # nats-py forgets the headers when it checks the size; the server closes for that.
        body = b"x" * (client.max_payload - 20)
        await client.client.publish("nobody.listens", body, headers={"Nats-Msg-Id": "a" * 64})
        async with asyncio.timeout(10):
            await rebuilt.wait()
        assert client.client is not first
        assert first.is_closed
        assert await _answers(client)


async def test_a_dead_read_loop_is_noticed_and_replaced(nats_server: str) -> None:
    async with JetStreamClient(nats_server) as client:
        first = client.client
        assert first._reading_task is not None
        first._reading_task.cancel()
        await asyncio.wait({first._reading_task})
        assert first.is_connected
        with pytest.raises(BrokerUnavailable):
            await client.api("INFO")
        assert await client.ready(LATER)
        assert client.client is not first
        assert await _answers(client)


async def test_refusals_of_the_api_carry_their_code(js_client: JetStreamClient) -> None:
    with pytest.raises(ApiError) as caught:
        await js_client.get_stream_info("ABSENT")
    assert caught.value.err_code == 10059


async def test_nobody_answering_is_unavailable(js_client: JetStreamClient) -> None:
    with pytest.raises(BrokerUnavailable):
        await js_client.request("nobody.listens", b"")


async def test_user_password_and_denied_subjects() -> None:
    config = (
        'authorization { users: [{user: "u", password: "pw", permissions: '
        '{publish: {allow: ["$JS.API.>"]}, subscribe: ">"}}] }'
    )
    with EmbeddedNats(config=config) as server:
        settings = Settings.defaults(nats_url=server.url, nats_user="u", nats_password="pw")  # noqa: S106
        async with JetStreamClient.from_settings(settings) as client:
            assert await _answers(client)
            await client.client.publish("evt.denied", b"")
            assert await _answers(client)
            assert client.denied_subjects == {"evt.denied"}
        refused = JetStreamClient(
            server.url,
            user="u",
            password="wrong",  # noqa: S106
            connect_timeout=SOON,
        )
        with pytest.raises(BrokerUnavailable, match=r"(?i)authorization"):
            await refused.connect()
        await refused.close()


async def test_token() -> None:
    with EmbeddedNats(config='authorization { token: "tok" }') as server:
        async with JetStreamClient(server.url, token="tok") as client:  # noqa: S106
            assert await _answers(client)


@pytest.mark.parametrize("as_file", [True, False])
async def test_nkey_as_seed_or_file(tmp_path: Path, *, as_file: bool) -> None:
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    path = tmp_path / "user.nk"
    path.write_bytes(seed + b"\n")
    path.chmod(0o600)
    with EmbeddedNats(config=f"authorization {{ users: [{{nkey: {public}}}] }}") as server:
        given = path if as_file else seed.decode()
        async with JetStreamClient(server.url, nkeys_seed=given) as client:
            assert await _answers(client)


def _pair(prefix: int) -> tuple[bytes, str]:
    seed: bytes = nkeys.encode_seed(os.urandom(32), prefix)
    return seed, nkeys.from_seed(bytearray(seed)).public_key.decode()


def _jwt(kind: str, issuer: tuple[bytes, str], subject: str, **claims: object) -> str:
    def part(value: object) -> str:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    nats = {"type": kind, "version": 2, **claims}
    body = {"jti": subject, "iat": 1, "iss": issuer[1], "name": kind, "sub": subject, "nats": nats}
    signed = f"{part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{part(body)}"
    return f"{signed}.{part(nkeys.from_seed(bytearray(issuer[0])).sign(signed.encode()))}"


async def test_credentials_file(tmp_path: Path) -> None:
    operator, user = _pair(nkeys.PREFIX_BYTE_OPERATOR), _pair(nkeys.PREFIX_BYTE_USER)
    account, system = _pair(nkeys.PREFIX_BYTE_ACCOUNT), _pair(nkeys.PREFIX_BYTE_ACCOUNT)
    unlimited = dict.fromkeys(("subs", "conn", "leaf", "imports", "exports", "data", "payload"), -1)
    storage = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
    config = f"""
    operator: {_jwt("operator", operator, operator[1])}
    system_account: {system[1]}
    resolver: MEMORY
    resolver_preload: {{
      {account[1]}: {_jwt("account", operator, account[1], limits=unlimited | storage)}
      {system[1]}: {_jwt("account", operator, system[1], limits=unlimited)}
    }}"""
    token = _jwt("user", account, user[1], subs=-1, data=-1, payload=-1)
    path = tmp_path / "user.creds"
    path.write_text(
        f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user[0].decode()}\n------END USER NKEY SEED------\n"
    )
    path.chmod(0o600)
    with EmbeddedNats(config=config) as server:
        async with JetStreamClient(server.url, credentials=path) as client:
            assert await _answers(client)


async def test_tls_with_a_client_certificate() -> None:
    config = (
        f'tls {{ cert_file: "{TLS / "server.pem"}", key_file: "{TLS / "server.key"}", '
        f'ca_file: "{TLS / "ca.pem"}", verify: true }}'
    )
    with EmbeddedNats(config=config) as server:
        async with JetStreamClient(
            server.url,
            tls=TLS / "ca.pem",
            tls_cert=TLS / "client.pem",
            tls_key=TLS / "client.key",
        ) as client:
            assert await _answers(client)
        context = ssl.create_default_context(cafile=TLS / "ca.pem")
        context.load_cert_chain(TLS / "client.pem", TLS / "client.key")
        async with JetStreamClient(server.url, tls=context) as client:
            assert await _answers(client)


@pytest.mark.parametrize("option", ["credentials", "nkeys_seed", "tls"])
@pytest.mark.parametrize("content", [None, ""])
async def test_a_missing_or_empty_file_is_a_configuration_error(
    tmp_path: Path, option: str, content: str | None
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_text(content)
    client = JetStreamClient("nats://127.0.0.1:1", **{option: path})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError):
        await client.connect()


async def test_a_secret_that_others_can_read_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "user.nk"
    path.write_bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
    path.chmod(0o644)
    client = JetStreamClient("nats://127.0.0.1:1", nkeys_seed=path, connect_timeout=SOON / 10)
    with pytest.raises(BrokerUnavailable):
        await client.connect()
    assert any("read by others" in record.message for record in caplog.records)
