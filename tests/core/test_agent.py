"""The one loop of a host: what it may take away, and when."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from overland.model.nve import Fact, KernelState, NveIntent, Op, OpFailure, TsiIntent, VnIntent
from overland.nve.agent import Agent
from overland.nve.render import render


class Memory:
    """A kernel in memory. Everything that is performed leaves its trace."""

    def __init__(self, state: KernelState) -> None:
        self.state = state
        self.removed: list[Fact] = []

    async def snapshot(self) -> KernelState:
        return self.state

    async def apply(self, ops: Sequence[Op]) -> list[OpFailure]:
        self.removed += [op.fact for op in ops if op.verb == "remove"]
        return []

    async def dropped_in_transit(self, bridge: str, mac: str) -> dict[str, int]:
        return {}


def vn(name: str, vni: int) -> VnIntent:
    tsi = TsiIntent(
        owner=f"vm-{name}",
        index=0,
        kind="tap",
        mac=f"02:00:00:00:00:{vni:02x}",
        ipv4="10.0.0.5",
        state="activated",
    )
    return VnIntent(
        network=name, vni=vni, mtu=1500, underlay="ipv4", local="192.0.2.1", tsis=(tsi,)
    )


RED, BLUE = vn("red", 41), vn("blue", 42)


@pytest.mark.req("N-21")
async def test_a_restarted_daemon_removes_nothing_before_it_has_heard_of_every_vn() -> None:
    """VNs come one by one; the tap of a VM that runs in the last one must live to see it come."""
    kernel = Memory(render(NveIntent(vns=(BLUE, RED))))
    agent = Agent(kernel, lambda port: None)
    await agent.want(NveIntent(vns=(BLUE,)))
    assert kernel.removed == []
    await agent.want(NveIntent(vns=(BLUE, RED)))
    agent.complete()
    await agent.reconcile()
    assert kernel.removed == []


@pytest.mark.req("N-21")
@pytest.mark.parametrize("vns", [(BLUE,), ()], ids=["another", "none"])
async def test_what_belongs_to_no_vn_goes_once_all_have_been_heard_of(
    vns: tuple[VnIntent, ...],
) -> None:
    """A VN was deleted while the daemon was away: nobody will ever push it."""
    kernel = Memory(render(NveIntent(vns=(*vns, RED))))
    agent = Agent(kernel, lambda port: None)
    if vns:
        await agent.want(NveIntent(vns=vns))
    assert kernel.removed == []
    agent.complete()
    await agent.reconcile()
    assert {fact.name for fact in kernel.removed if hasattr(fact, "name")} == {
        link.name for link in render(NveIntent(vns=(RED,))).links
    }
