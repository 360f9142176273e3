"""Works out which numbered flows run between a machine under test and its correspondents."""

import ipaddress
import itertools
from collections.abc import Iterator, Sequence

import msgspec

# The header of a datagram, and what the helper's buffers hold; both are fixed in helper.c.
MIN_PAYLOAD = 32
MAX_PAYLOAD = 9000
DEFAULT_PORT = 20000
MAX_PORT = 65535
# Enough records to see a stall of a few hundredths of a second, few enough not to matter.
DEFAULT_TCP_RATE = 50
MAX_ID = 63
_FORBIDDEN = frozenset('"\\:>/')


class PlanError(Exception):
    """The flows asked for cannot be laid out; the message is fit for the user."""


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that takes part, and its addresses on the overlay, one per family at most."""

    name: str
    ipv4: str | None = None
    ipv6: str | None = None

    def address(self, family: str) -> str | None:
        """The address of `family`, which is "ipv4" or "ipv6"."""
        return self.ipv4 if family == "ipv4" else self.ipv6


class NodePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The FLOW arguments of `overland-probe` on one node."""

    name: str
    flows: tuple[str, ...]


class ProbePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What every node runs: the machine under test first, then the correspondents in order.

    `flow_ids` are all flows of the run, to be handed to `overland.probe.verdict.judge`.
    """

    nodes: tuple[NodePlan, ...]
    flow_ids: tuple[str, ...]


class _Pair(msgspec.Struct, frozen=True, kw_only=True):
    peer: Node
    family: str
    vm_address: str
    peer_address: str
    port: int


def plan_probe(
    vm: Node,
    correspondents: Sequence[Node],
    *,
    rate: int,
    payload: int,
    rate_from_vm: int | None = None,
    tcp: bool = False,
    tcp_rate: int = DEFAULT_TCP_RATE,
    base_port: int = DEFAULT_PORT,
) -> ProbePlan:
    """Lay out flows between `vm` and each correspondent, over every family both ends have.

    `rate` is in datagrams per second for each direction, over all correspondents and families
    together; what does not divide evenly goes to the first ones, so the sum is exact. With
    `rate_from_vm` the direction away from the VM has a rate of its own. `payload` is
    the size of the UDP payload in bytes. With `tcp`, a stream of `tcp_rate` records per second
    runs beside every UDP flow, on the same port number. Flows with the n-th correspondent, from 0,
    always have port `base_port` + 2n over IPv4 and one more over IPv6, in both directions; two
    plans that share a correspondent at the same time need base ports far enough apart.

    Raises `PlanError` when a flow would be left without a single datagram per second.
    """
    _check(vm, correspondents, payload=payload, tcp_rate=tcp_rate)
    pairs = list(_pairs(vm, correspondents, base_port))
    if not pairs:
        raise PlanError(f"{vm.name} has no address family in common with any correspondent")
    if base_port < 1 or pairs[-1].port > MAX_PORT:
        raise PlanError(f"the ports from {base_port} on do not suffice")
    back = rate if rate_from_vm is None else rate_from_vm
    if min(rate, back) < len(pairs):
        raise PlanError(
            f"{min(rate, back)} packets per second cannot be shared by {len(pairs)} flows per "
            "direction"
        )
    flows: dict[str, list[str]] = {node.name: [] for node in (vm, *correspondents)}
    ids = []
    shares = zip(split(rate, len(pairs)), split(back, len(pairs)), strict=True)
    for pair, (to_vm, from_vm) in zip(pairs, shares, strict=True):
        for sender, receiver, address, share in (
            (pair.peer.name, vm.name, pair.vm_address, to_vm),
            (vm.name, pair.peer.name, pair.peer_address, from_vm),
        ):
            id = f"{sender}>{receiver}/{pair.family}"
            at = f"{address}:{pair.port}"
            ids.append(id)
            flows[sender].append(f"send:{id}:{at}:{share}:{payload}")
            flows[receiver].append(f"recv:{id}:{at}")
            if tcp:
                ids.append(f"{id}/tcp")
                flows[sender].append(f"tcpsend:{id}/tcp:{at}:{tcp_rate}:{payload}")
                flows[receiver].append(f"tcprecv:{id}/tcp:{at}")
    nodes = tuple(NodePlan(name=name, flows=tuple(args)) for name, args in flows.items() if args)
    return ProbePlan(nodes=nodes, flow_ids=tuple(ids))


def split(rate: int, parts: int) -> list[int]:
    """Share `rate` out to `parts` as evenly as whole numbers allow; the sum is `rate`."""
    share, rest = divmod(rate, parts)
    return [share + 1] * rest + [share] * (parts - rest)


def _check(vm: Node, correspondents: Sequence[Node], *, payload: int, tcp_rate: int) -> None:
    if not MIN_PAYLOAD <= payload <= MAX_PAYLOAD:
        raise PlanError(f"the payload must be {MIN_PAYLOAD} to {MAX_PAYLOAD} bytes, not {payload}")
    if tcp_rate < 1:
        raise PlanError(f"the TCP rate must be at least 1 record per second, not {tcp_rate}")
    names = [vm.name, *(peer.name for peer in correspondents)]
    for name in names:
        if not name or any(c <= " " or c > "~" or c in _FORBIDDEN for c in name):
            raise PlanError(f'"{name}" cannot be used in a flow id')
    for first, second in itertools.combinations(sorted(names), 2):
        if first == second:
            raise PlanError(f"there are two nodes called {first}")
    for node in (vm, *correspondents):
        _check_addresses(node)
        longest = f"{vm.name}>{node.name}/ipv4/tcp"
        if len(longest) > MAX_ID:
            raise PlanError(f'the flow id "{longest}" is longer than {MAX_ID} characters')


def _check_addresses(node: Node) -> None:
    for family, version in (("ipv4", 4), ("ipv6", 6)):
        text = node.address(family)
        if text is None:
            continue
        try:
            found = ipaddress.ip_address(text).version
        except ValueError:
            found = None
        if found != version:
            raise PlanError(f'{node.name}: "{text}" is not an IPv{version} address')


def _pairs(vm: Node, correspondents: Sequence[Node], base_port: int) -> Iterator[_Pair]:
    for index, peer in enumerate(correspondents):
        for offset, family in enumerate(("ipv4", "ipv6")):
            mine, theirs = vm.address(family), peer.address(family)
            if mine is not None and theirs is not None:
                yield _Pair(
                    peer=peer,
                    family=family,
                    vm_address=mine,
                    peer_address=theirs,
                    port=base_port + 2 * index + offset,
                )
