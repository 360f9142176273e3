"""A name follows a VM whose move has changed its addresses: dynamic update (RFC 2136), signed.

A convenience for those who look the name up anew (R-27). Nobody waits for it, and nothing depends
on it: a name server that refuses, or says nothing, is told of and left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import dns.asyncquery
import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.tsig
import dns.tsigkeyring
import dns.update

from overland.config import Dns
from overland.model.readdress import AddressChange
from overland.ports import PortFailure

TRIES = 3
TRY_S = 2.0
"""How long each try waits for the answer."""


class NameFailure(PortFailure):
    """The name server did not do what it was asked, or said nothing."""


async def follow(config: Dns, vm: str, changes: Iterable[AddressChange]) -> str:
    """Have the name of `vm` lead to its new addresses; what was done, or NameFailure.

    Other addresses that the name has stay. It does no harm to ask for it twice.
    """
    name = f"{vm}.{config.zone.rstrip('.')}."
    try:
        update = _update(config, name, changes)
    except (OSError, ValueError, dns.exception.DNSException) as error:
        raise NameFailure(f"{name}: {error}") from None
    answer = await _asked(config, update)
    if answer.rcode() != dns.rcode.NOERROR:
        raise NameFailure(f"{name}: {config.server} says {dns.rcode.to_text(answer.rcode())}")
    return f"{name} updated at {config.server}"


def _update(config: Dns, name: str, changes: Iterable[AddressChange]) -> dns.update.UpdateMessage:
    """One message: all of it comes true, or nothing."""
    secret = Path(config.key_file).read_text().strip()
    update = dns.update.UpdateMessage(
        config.zone,
        keyring=dns.tsigkeyring.from_text({config.key_name: secret}),
        keyname=dns.name.from_text(config.key_name),
        keyalgorithm=config.key_algorithm,
    )
    for change in changes:
        for old, new in zip(change.old, change.new, strict=True):
            kind = "AAAA" if ":" in new else "A"
            update.delete(name, kind, old)
            update.add(name, config.ttl_s, kind, new)
    return update


async def _asked(config: Dns, update: dns.update.UpdateMessage) -> dns.message.Message:
    """The answer, signed with the key as well; a message or its answer may be lost."""
    for _ in range(TRIES):
        try:
            return await dns.asyncquery.udp(
                update, config.address, timeout=TRY_S, port=config.port, ignore_unexpected=True
            )
        except dns.exception.Timeout:
            continue
        except (OSError, dns.exception.DNSException) as error:
            raise NameFailure(f"{config.server}: {str(error) or type(error).__name__}") from None
    raise NameFailure(f"{config.server}: no answer in {TRIES * TRY_S:g} s")
