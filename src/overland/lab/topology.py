"""A lab as data: names and addresses of its hosts. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from overland.model.names import parse_name

LABS = Path("/var/lib/overland/labs")
UNDERLAY_MTU = 1600
WIRE_PORT = 6640


@dataclass(frozen=True, slots=True)
class LabHost:
    """One host: a network namespace with one underlay address of each family, and a locator."""

    name: str
    namespace: str
    underlay_ipv4: str
    underlay_ipv6: str
    locator: str


@dataclass(frozen=True, slots=True)
class Topology:
    """A lab's hosts, its NVAs and the underlay that joins them."""

    name: str
    nvas: tuple[LabHost, ...]
    hosts: tuple[LabHost, ...]

    @property
    def underlay(self) -> str:
        return f"ovl-{self.name}-u"

    @property
    def folder(self) -> Path:
        return LABS / self.name


def topology(name: str, hosts: int, nvas: int = 1) -> Topology:
    """The lab `name` with `hosts` hosts and `nvas` NVAs; ValueError when that is not possible."""
    parse_name(name, "lab")
    if not 1 <= hosts <= 200:
        raise ValueError(f"{hosts} hosts: use 1 to 200")
    if nvas not in (1, 3, 5):
        raise ValueError(f"{nvas} NVAs: use 1, 3 or 5, of which most must live")

    def host(called: str, number: int) -> LabHost:
        return LabHost(
            name=called,
            namespace=f"ovl-{name}-{called}",
            underlay_ipv4=f"10.200.0.{number}",
            underlay_ipv6=f"fd00:200::{number:x}",
            locator=f"2001:db8:a:{number:x}::/64",
        )

    return Topology(
        name=name,
        nvas=(
            (host("nva", 254),)
            if nvas == 1
            else tuple(host(f"nva{number}", 255 - number) for number in range(1, nvas + 1))
        ),
        hosts=tuple(host(f"h{number}", number) for number in range(1, hosts + 1)),
    )


def endpoint_namespace(lab: str, endpoint: str) -> str:
    return f"ovl-{lab}-e-{endpoint}"


def of_lab(name: str, namespaces: Iterable[str]) -> list[str]:
    """Those of all `namespaces` that are lab `name`'s; `a-b` is not a part of lab `a`.

    A lab is known by its underlay's namespace; what several may claim is the longest name's.
    """
    mine = [each for each in namespaces if each.startswith(f"ovl-{name}-")]
    ours = f"ovl-{name}-u", f"ovl-{name}-e-"
    others = [each[:-1] for each in mine if each.endswith("-u") and not each.startswith(ours)]
    return sorted(each for each in mine if not each.startswith(tuple(others)))
