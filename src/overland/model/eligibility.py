"""Who may be moved: what is known of one VM, who said so, and when (R-19, R-23 to R-28, R-62).

There is a record for a VM, and none for a network, an owner or the domain (R-24).
"""

from __future__ import annotations

from typing import Literal

from overland.model.cluster import Record

LatencyClass = Literal["any", "interactive", "realtime", "fixed"]

LONGEST_OUTAGE_MS: dict[LatencyClass, float | None] = {
    "any": None,
    "interactive": 1000.0,
    "realtime": 100.0,
    "fixed": 0.0,
}
"""The longest outage, in ms, that the work of a VM of this class bears; None: any (R-62).

`interactive`: a person waits. `realtime`: what is late is lost, as in voice. `fixed`: none at all.
"""


class Declaration(Record, frozen=True, kw_only=True):
    """What the operator knows of the VM's work.

    `outside`: addresses and subnets of correspondents that may be in no VN. `uncovered`: whether a
    move is refused when one of them cannot be told of it, or carried out and flagged (R-19).
    `at_ns` is CLOCK_REALTIME at the NVA.
    """

    outside: tuple[str, ...] = ()
    uncovered: Literal["refuse", "flag"] = "refuse"
    latency: LatencyClass = "any"
    origin: str = ""
    at_ns: int = 0


class Statement(Record, frozen=True, kw_only=True):
    """What the owner of `vm` signs: whether all its applications handle a change of address.

    For all of their connections, at both ends (R-24). `at_ns` is CLOCK_REALTIME at the owner.
    """

    vm: str
    handles_address_change: bool
    at_ns: int


class Signed(Record, frozen=True, kw_only=True):
    """A Statement as bytes, the owner's signature of them, and his certificate (DER)."""

    statement: bytes
    signature: bytes
    certificate: bytes


class Registration(Record, frozen=True, kw_only=True):
    """That a Statement was believed; `signed` is kept for anyone to check again.

    `origin` is `owner:NAME`, as in the certificate; `at_ns` when the NVA heard it.
    """

    origin: str
    at_ns: int
    signed: Signed


class Revocation(Record, frozen=True, kw_only=True):
    """Who has ended a registration, and when (CLOCK_REALTIME at the NVA)."""

    origin: str
    at_ns: int


class Eligibility(Record, frozen=True, kw_only=True):
    """The record of VM `vm`. It outlives the VM, so that no statement is ever good twice.

    `heard_ns`: what has been stated before that, by the owner's clock, is of no account any more.
    """

    vm: str
    declaration: Declaration = Declaration()
    registration: Registration | None = None
    revocation: Revocation | None = None
    heard_ns: int = 0


class Grounds(Record, frozen=True, kw_only=True):
    """Why a move could begin: for whom it may ask, later (R-28).

    `covered`: every address that its applications see stays as it is, at both ends. `registered`:
    not every one, but its owner has registered that they handle it. `origin` says who knew, `at_ns`
    since when. `flags` are what was not covered and went all the same.
    """

    basis: Literal["covered", "registered"]
    origin: str
    at_ns: int
    flags: tuple[str, ...] = ()
