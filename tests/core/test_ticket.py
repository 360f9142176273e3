"""Only the NVA's own ticket for this very move makes a copy run or end (R-58, HO-27)."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from overland.mobility import messages as m
from overland.model.ticket import VALID_S, Seal, Ticket, ticket_of, ticket_refusal
from overland.nve.handovers import Handovers, _Running
from overland.nve.journal import PartJournal
from overland.wire import tls
from overland.wire.seal import Forged, Sealer, opened
from tests.core.moves import NEW, OLD, PEER, PORT, in_phase
from tests.core.parts import WAYS

NOW_NS = 10**18
TICKET = ticket_of(in_phase("committed"), 2, NOW_NS)


def refusal(ticket: Ticket, **other: object) -> str | None:
    here = {"move": "m1", "vm": "web", "ports": (PORT,), "nve": NEW, "base_version": 1}
    return ticket_refusal(ticket, **{**here, "now_ns": NOW_NS, **other})  # type: ignore[arg-type]


@pytest.mark.req("R-58")
def test_the_ticket_covers_both_ends_of_its_move_and_nothing_else() -> None:
    assert refusal(TICKET) is None
    assert refusal(TICKET, nve=OLD) is None
    assert refusal(TICKET, nve=PEER) == f"the ticket is not for {PEER}"
    assert "in move m1" in str(refusal(TICKET, move="m2"))
    assert "for VM web" in str(refusal(TICKET, vm="other"))
    port = msgspec.structs.replace(PORT, ipv4="10.0.0.6")
    assert refusal(TICKET, ports=(port,)) == "the ticket is for other addresses"
    assert refusal(TICKET, base_version=2) == "the ticket is for version 1, 2 is here"
    late_ns = NOW_NS + VALID_S * 10**9
    assert refusal(TICKET, now_ns=late_ns) == "the ticket has expired"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains; `nva` and `h1` of the first, `nva` of the other."""
    path = tmp_path_factory.mktemp("tls")
    for domain in ("ours", "theirs"):
        tls.create_authority(path / domain)
        tls.issue(path / domain, "nva", "nva", ["127.0.0.1"])
    tls.issue(path / "ours", "h1", "nve:h1", [])
    return path


def sealed(folder: Path, by: str) -> Seal:
    return Sealer(folder / f"{by}.crt", folder / f"{by}.key").seal(TICKET)


@pytest.mark.req("R-58")
@pytest.mark.req("N-12")
def test_a_ticket_is_believed_when_the_nva_of_this_domain_signed_it(folder: Path) -> None:
    ca = folder / "ours" / "ca.crt"
    seal = sealed(folder / "ours", "nva")
    assert opened(seal, ca) == TICKET
    other = msgspec.structs.replace(TICKET, new_nve="h9")
    forged = msgspec.structs.replace(seal, ticket=msgspec.json.encode(other))
    for bad, why in (
        (None, "there is no ticket"),
        (forged, "not signed by this domain"),
        (sealed(folder / "theirs", "nva"), "not signed by this domain"),
        (sealed(folder / "ours", "h1"), "not signed by the NVA"),
        (msgspec.structs.replace(seal, certificate=b"x"), "not signed by this domain"),
    ):
        with pytest.raises(Forged, match=why):
            opened(bad, ca)


@pytest.mark.req("R-58")
@pytest.mark.parametrize(
    ("role", "column", "order"),
    [
        ("new", "whole", m.Activate(move="m1", version=2)),
        ("old", "stopped", m.Retire(move="m1", version=2)),
    ],
)
async def test_without_a_ticket_nothing_changes(
    tmp_path: Path, role: str, column: str, order: m.Activate | m.Retire
) -> None:
    """Forged orders reach the shell and go no further; the same orders with a ticket do."""
    said: list[m.AnyReport] = []
    part = WAYS[role][column].part  # type: ignore[index]
    good = msgspec.structs.replace(TICKET, expires_ns=1 << 62)
    other = msgspec.structs.replace(good, addresses=())
    tickets: list[Ticket | str] = ["there is no ticket", other, good]
    handovers = Handovers(
        part.nve,
        *(None, None, None, None),  # type: ignore[arg-type]
        said.append,
        100,
        PartJournal(tmp_path),
        lambda _: tickets.pop(0),
    )
    running = _Running(handovers, part, 1)
    handovers._running["m1"] = running  # noqa: SLF001 - as if it had been prepared
    handovers.order(order)
    handovers.order(order)
    assert running.part == part
    assert [each.step for each in said if isinstance(each, m.Failed)] == ["ticket", "ticket"]
    handovers.order(order)
    assert running.part != part
    running.void()
