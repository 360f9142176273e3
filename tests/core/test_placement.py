"""Where the VMs of a host go when it is emptied."""

from __future__ import annotations

import msgspec

from overland.model.cluster import Host, Interface, Network, Vm, VmState
from overland.nva.cluster import Cluster
from overland.nva.placement import Placement, drain_plan
from overland.nva.rules import host_blockers


def domain(free_mib: dict[str, int], vms: dict[str, tuple[int, VmState]]) -> Cluster:
    """All VMs on h1; `free_mib` is the memory of the other hosts."""
    found = Cluster()
    found.networks["blue"] = Network(name="blue", vni=42)
    for n, (name, mib) in enumerate({"h1": 4096, **free_mib}.items(), 1):
        found.hosts[name] = Host(
            name=name,
            underlay_ipv4=f"192.0.2.{n}",
            underlay_mtu=9000,
            ready=True,
            memory_total_mib=mib,
            accelerator="tcg",
        )
    for n, (name, (mib, state)) in enumerate(vms.items(), 1):
        face = Interface(network="blue", mac=f"02:00:00:00:00:{n:02x}")
        found.vms[name] = Vm(name=name, host="h1", state=state, memory_mib=mib, interfaces=(face,))
    return found


def test_the_biggest_goes_first_and_each_where_most_memory_is_free() -> None:
    now = domain(
        {"h2": 1000, "h3": 900},
        {"small": (128, "running"), "big": (512, "running"), "off": (128, "shutdown")},
    )
    plan, refused = drain_plan(now, "h1")
    assert refused == ()
    assert plan == (
        Placement(vm="big", to="h2", mode="hot"),
        Placement(vm="off", to="h3", mode="cold"),
        Placement(vm="small", to="h3", mode="hot"),
    )
    assert {vm.host for vm in now.vms.values()} == {"h1"}, "a plan changes nothing"


def test_only_a_vm_that_runs_goes_hot() -> None:
    states: tuple[VmState, ...] = ("running", "paused", "suspended", "crashed")
    plan, refused = drain_plan(
        domain({"h2": 1000}, {state: (100, state) for state in states}), "h1"
    )
    assert refused == ()
    assert {each.vm: each.mode for each in plan} == {
        "running": "hot",
        "paused": "cold",
        "suspended": "cold",
        "crashed": "cold",
    }


def test_who_has_nowhere_to_go_is_named_with_what_speaks_against_each_host() -> None:
    now = domain({"h2": 700, "h3": 100}, {"one": (512, "running"), "two": (512, "running")})
    plan, refused = drain_plan(now, "h1")
    assert [each.to for each in plan] == ["h2"]
    assert [each.what for each in refused] == ["vm two"]
    assert "h2: " in refused[0].why
    assert "h3: " in refused[0].why


def test_nothing_is_placed_on_a_drained_host() -> None:
    now = domain({"h2": 1000, "h3": 900}, {"one": (128, "running")})
    now.hosts["h2"] = msgspec.structs.replace(now.hosts["h2"], drained=True)
    assert [each.to for each in drain_plan(now, "h1")[0]] == ["h3"]
    assert [each.code for each in host_blockers(now, "h2")] == ["host_drained"]
