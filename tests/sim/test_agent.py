"""The agents in the simulation: what it would not notice it does not test, so bugs are planted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from overland.model.nve import BridgeEntry, KernelState, Link, NveIntent, Op, TunnelEntry
from overland.nve.delta import delta
from overland.nve.moving import Moving, settle
from overland.nve.render import render
from overland.sim import agent, run
from overland.sim.domain import BRIDGE, DEVICE, MAC, PORT
from overland.sim.kernel import after, forwarding

Compared = tuple[frozenset[str], tuple[Op, ...]]


def without_removes(intent: NveIntent, actual: KernelState, moving: frozenset[Moving]) -> Compared:
    desired = settle(render(intent), actual, intent, moving)
    puts = tuple(op for op in delta(desired, actual) if op.verb == "put")
    return frozenset(link.name for link in desired.links), puts


def without_settling(intent: NveIntent, actual: KernelState, moving: frozenset[Moving]) -> Compared:
    del moving
    desired = render(intent)
    return frozenset(link.name for link in desired.links), delta(desired, actual)


@pytest.mark.req("R-14")
@pytest.mark.parametrize("planted", [without_removes, without_settling])
def test_a_bug_planted_in_the_agent_is_found(
    planted: Callable[..., Compared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delta that forgets to remove; a round that takes a moving MAC back from its handover."""
    monkeypatch.setattr(agent, "compared", planted)
    assert run.first_failing(0, 500, 1) is not None


BRIDGE_LINK = Link(name=BRIDGE, kind="bridge", alias="b", mtu=1500)
VXLAN = Link(name=DEVICE, kind="vxlan", alias="v", mtu=1500, master=BRIDGE)
TAP = Link(name=PORT, kind="tap", alias="t", mtu=1500, master=BRIDGE)
TO_PORT = BridgeEntry(bridge=BRIDGE, mac=MAC, port=PORT)
TO_TUNNEL = BridgeEntry(bridge=BRIDGE, mac=MAC, port=DEVICE)
REMOTE = TunnelEntry(device=DEVICE, mac=MAC, remote="192.0.2.2")


def put(*facts: Link | BridgeEntry | TunnelEntry) -> KernelState:
    state, failures = after(KernelState(), tuple(Op(verb="put", fact=fact) for fact in facts))
    assert failures == ()
    return state


def test_a_frame_goes_where_the_entries_lead() -> None:
    assert forwarding(put(BRIDGE_LINK, VXLAN, TAP, TO_PORT)).way == PORT
    assert forwarding(put(BRIDGE_LINK, VXLAN, TO_TUNNEL, REMOTE)).way == "192.0.2.2"
    assert forwarding(put(BRIDGE_LINK, VXLAN, TO_TUNNEL)).way is None


def test_the_fake_kernel_replaces_refuses_and_takes_along_as_linux_does() -> None:
    state = put(BRIDGE_LINK, VXLAN, TAP, TO_PORT, TO_TUNNEL)
    assert state.bridge_entries == {TO_TUNNEL}
    bare, _ = after(state, (Op(verb="remove", fact=VXLAN),))
    assert bare.links == {BRIDGE_LINK, TAP}
    assert bare.bridge_entries == frozenset()
    same, failures = after(bare, (Op(verb="put", fact=TO_TUNNEL),))
    assert same == bare
    assert [failure.op.fact for failure in failures] == [TO_TUNNEL]
