"""The ticket of a move: what the NVA signs, and an NVE checks, before a copy runs or ends. Pure.

A new binding of address to place needs proof of its own, bound to the move (R-58, 6-7): whoever
can speak to an NVE, but is not the NVA, can neither make a copy run nor end one.
"""

from __future__ import annotations

from overland.model.cluster import Record
from overland.model.handover import Handover, MovingPort

VALID_S = 24 * 3600
"""Longer than any clock is wrong; a ticket is good for one move anyway."""


class Ticket(Record, frozen=True, kw_only=True):
    """That VM `vm` goes from `old_nve` to `new_nve` in move `move`, once, from `base_version` on.

    `addresses`: MAC, IPv4, IPv6 and what is valid beside them, of each interface with its network.
    `expires_ns` is CLOCK_REALTIME.
    """

    move: str
    vm: str
    addresses: tuple[str, ...]
    old_nve: str
    new_nve: str
    base_version: int
    expires_ns: int


class Seal(Record, frozen=True, kw_only=True):
    """A ticket as bytes, the NVA's signature of them, and the certificate that made it (DER)."""

    ticket: bytes
    signature: bytes
    certificate: bytes


def ticket_of(record: Handover, version: int, now_ns: int) -> Ticket:
    """The ticket with which `record` is committed as `version`."""
    return Ticket(
        move=record.id,
        vm=record.vm.name,
        addresses=_addresses(record.ports),
        old_nve=record.old_nve,
        new_nve=record.new_nve,
        base_version=version - 1,
        expires_ns=now_ns + VALID_S * 10**9,
    )


def ticket_refusal(
    ticket: Ticket,
    *,
    move: str,
    vm: str,
    ports: tuple[MovingPort, ...],
    nve: str,
    base_version: int,
    now_ns: int,
) -> str | None:
    """Why `ticket` does not cover this part of NVE `nve`; None when it does."""
    if nve not in (ticket.old_nve, ticket.new_nve):
        return f"the ticket is not for {nve}"
    if (ticket.move, ticket.vm) != (move, vm):
        return f"the ticket is for VM {ticket.vm} in move {ticket.move}"
    if ticket.addresses != _addresses(ports):
        return "the ticket is for other addresses"
    if ticket.base_version != base_version:
        return f"the ticket is for version {ticket.base_version}, {base_version} is here"
    if ticket.expires_ns <= now_ns:
        return "the ticket has expired"
    return None


def _addresses(ports: tuple[MovingPort, ...]) -> tuple[str, ...]:
    return tuple(
        " ".join((p.network, p.mac, p.ipv4 or "-", p.ipv6 or "-", *p.beside)) for p in ports
    )
