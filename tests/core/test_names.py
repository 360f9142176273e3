"""The name of a VM follows a change of its addresses: asked of a name server that checks the key.

RFC 2136 messages, signed (RFC 8945), against a responder with a zone of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.tsig
import dns.tsigkeyring
import dns.update
import msgspec
import pytest

from overland.config import ConfigFailure, Dns, NvaConfig, load
from overland.model.readdress import AddressChange
from overland.wire import dns as names

KEY, SECRET, OTHER = "overland", "c2VjcmV0IG9mIHRoZSB0ZXN0cyE=", "YW5vdGhlciBzZWNyZXQgYWx0b2c="
CHANGE = AddressChange(network="red", old=("10.42.0.50",), new=("10.42.0.60",))
SIX = AddressChange(network="red", old=("fd42::50",), new=("fd42::60",))


class NameServer(asyncio.DatagramProtocol):
    """A zone's primary: takes updates with the right key. `silent`: it hears and says nothing."""

    def __init__(self, zone: str) -> None:
        self.zone = dns.name.from_text(zone)
        self.records: set[tuple[str, str, str]] = set()
        self.silent = False
        self.asked = 0
        self._keys = dns.tsigkeyring.from_text({KEY: SECRET})

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    @property
    def port(self) -> int:
        return int(self.transport.get_extra_info("sockname")[1])

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.asked += 1
        if not self.silent:
            self.transport.sendto(self._answer(data), addr)

    def _answer(self, data: bytes) -> bytes:
        try:
            update = dns.message.from_wire(data, keyring=self._keys)
        except dns.exception.DNSException:
            answer = dns.message.make_response(
                dns.message.from_wire(data, ignore_trailing=True, keyring=False)
            )
            answer.set_rcode(dns.rcode.NOTAUTH)
            return answer.to_wire()
        assert isinstance(update, dns.update.UpdateMessage)
        assert update.had_tsig
        answer = dns.message.make_response(update)
        if update.zone[0].name == self.zone:
            self._take(update)
        else:
            answer.set_rcode(dns.rcode.NOTZONE)
        return answer.to_wire()

    def _take(self, update: dns.update.UpdateMessage) -> None:
        for rrset in update.update:
            kind = dns.rdatatype.to_text(rrset.rdtype)
            rows = {(rrset.name.to_text(), kind, each.to_text()) for each in rrset}
            if rrset.deleting == dns.rdataclass.NONE:
                self.records -= rows
            else:
                assert rrset.ttl == 30
                self.records |= rows


@pytest.fixture
async def server() -> AsyncIterator[NameServer]:
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(
        lambda: NameServer("example.org."), local_addr=("127.0.0.1", 0)
    )
    try:
        yield server
    finally:
        transport.close()


def settings(folder: Path, port: int, zone: str = "example.org", secret: str = SECRET) -> Dns:
    path = folder / "key"
    path.write_text(f"{secret}\n")
    return Dns(server=f"127.0.0.1:{port}", zone=zone, key_name=KEY, key_file=str(path))


def address(name: str, kind: str, value: str) -> tuple[str, str, str]:
    return (f"{name}.example.org.", kind, value)


@pytest.mark.req("R-27")
async def test_the_name_leads_to_the_new_addresses_and_no_more_to_the_old(
    server: NameServer, tmp_path: Path
) -> None:
    """Whatever else the name has, and other names, stay. Asked for twice it is the same."""
    other = {address("web", "A", "192.0.2.9"), address("db", "A", "10.42.0.50")}
    server.records = {address("web", "A", "10.42.0.50"), *other}
    config = settings(tmp_path, server.port)
    for _ in range(2):
        said = await names.follow(config, "web", (CHANGE, SIX))
        assert said == f"web.example.org. updated at 127.0.0.1:{server.port}"
        assert server.records == {
            address("web", "A", "10.42.0.60"),
            address("web", "AAAA", "fd42::60"),
            *other,
        }


@pytest.mark.parametrize(
    ("zone", "secret", "why"),
    [
        ("example.com", SECRET, "NOTZONE"),
        ("example.org", OTHER, "TSIG"),
        ("example.org", "", "TSIG"),
    ],
)
async def test_what_the_name_server_refuses_is_a_failure_that_says_so(
    server: NameServer, tmp_path: Path, zone: str, secret: str, why: str
) -> None:
    with pytest.raises(names.NameFailure, match=why):
        await names.follow(settings(tmp_path, server.port, zone, secret), "web", (CHANGE,))
    assert server.records == set()


async def test_without_its_key_nothing_is_sent(server: NameServer, tmp_path: Path) -> None:
    config = msgspec.structs.replace(settings(tmp_path, server.port), key_file="/nil")
    with pytest.raises(names.NameFailure, match="No such file"):
        await names.follow(config, "web", (CHANGE,))
    assert server.asked == 0


@pytest.mark.req("R-27")
async def test_a_silent_name_server_is_asked_some_times_and_then_left_alone(
    server: NameServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "TRY_S", 0.05)
    server.silent = True
    with pytest.raises(names.NameFailure, match=r"127\.0\.0\.1:\d+: no answer in 0\.15 s"):
        await names.follow(settings(tmp_path, server.port), "web", (CHANGE,))
    assert server.asked == names.TRIES


async def test_who_is_not_there_is_a_failure_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "TRY_S", 0.05)
    with pytest.raises(names.NameFailure, match=r"^127\.0\.0\.1:9: "):
        await names.follow(settings(tmp_path, 9), "web", (CHANGE,))


# ------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ("192.0.2.53", ("192.0.2.53", 53)),
        ("192.0.2.53:5353", ("192.0.2.53", 5353)),
        ("2001:db8::53", ("2001:db8::53", 53)),
        ("[2001:db8::53]", ("2001:db8::53", 53)),
        ("[2001:db8::53]:5353", ("2001:db8::53", 5353)),
        ("ns.example.org", None),
        ("192.0.2.53:dns", None),
        ("192.0.2.53:0", None),
    ],
)
def test_the_server_is_an_address(
    tmp_path: Path, server: str, expected: tuple[str, int] | None
) -> None:
    """A name would have to be looked up, of all places, there."""
    path = tmp_path / "nva.toml"
    path.write_text(
        'store = "s"\nwire_address = "w"\n[tls]\nca = "c"\ncertificate = "c"\nkey = "k"\n'
        f'[dns]\nserver = "{server}"\nzone = "z"\nkey_name = "k"\nkey_file = "f"\n'
    )
    if expected is None:
        with pytest.raises(ConfigFailure, match=r"`server`: .* is no IP address"):
            load(path, NvaConfig)
        return
    config = load(path, NvaConfig)
    assert isinstance(config, NvaConfig)
    assert config.dns is not None
    assert (config.dns.address, config.dns.port) == expected
