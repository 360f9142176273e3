"""The plan shares the rate exactly and gives both ends of a flow matching arguments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overland.probe.plan import Node, PlanError, ProbePlan, plan_probe, split

VM = Node(name="vm", ipv4="10.0.0.1", ipv6="fd00::1")


def peers(count: int) -> list[Node]:
    return [
        Node(name=f"p{n}", ipv4=f"10.0.0.{n + 2}", ipv6=f"fd00::{n + 2:x}") for n in range(count)
    ]


def flows_of(plan: ProbePlan, name: str) -> tuple[str, ...]:
    return next(node.flows for node in plan.nodes if node.name == name)


def fields(flow: str) -> tuple[str, str, str]:
    kind, id, rest = flow.split(":", 2)
    return kind, id, rest


@given(st.integers(min_value=0, max_value=10**6), st.integers(min_value=1, max_value=200))
def test_a_split_is_exact_and_even(rate: int, parts: int) -> None:
    shares = split(rate, parts)
    assert sum(shares) == rate
    assert len(shares) == parts
    assert max(shares) - min(shares) <= 1


@given(
    count=st.integers(min_value=1, max_value=30),
    spare=st.integers(min_value=0, max_value=20_000),
    tcp=st.booleans(),
)
def test_both_directions_carry_the_exact_rate_and_every_end_has_its_other_end(
    count: int, spare: int, tcp: bool
) -> None:
    rate = 2 * count + spare
    plan = plan_probe(VM, peers(count), rate=rate, payload=200, tcp=tcp)
    out: dict[str, tuple[str, str]] = {}
    into: dict[str, tuple[str, str]] = {}
    for node in plan.nodes:
        for kind, id, rest in map(fields, node.flows):
            (out if kind.endswith("send") else into)[id] = (node.name, rest)
    assert out.keys() == into.keys() == set(plan.flow_ids)
    assert len(plan.flow_ids) == len(set(plan.flow_ids)) == count * 2 * 2 * (2 if tcp else 1)
    rates = {"from": 0, "to": 0}
    for id, (sender, rest) in out.items():
        at, flow_rate, payload = rest.rsplit(":", 2)
        receiver, listen = into[id]
        assert listen == at
        assert payload == "200"
        assert id.startswith(f"{sender}>{receiver}/")
        if not id.endswith("/tcp"):
            rates["from" if sender == "vm" else "to"] += int(flow_rate)
    assert rates == {"from": rate, "to": rate}


def test_the_arguments_are_those_the_helper_documents() -> None:
    plan = plan_probe(VM, peers(1), rate=5, payload=64, tcp=True, base_port=4000)
    assert [node.name for node in plan.nodes] == ["vm", "p0"]
    assert flows_of(plan, "p0") == (
        "send:p0>vm/ipv4:10.0.0.1:4000:3:64",
        "tcpsend:p0>vm/ipv4/tcp:10.0.0.1:4000:50:64",
        "recv:vm>p0/ipv4:10.0.0.2:4000",
        "tcprecv:vm>p0/ipv4/tcp:10.0.0.2:4000",
        "send:p0>vm/ipv6:fd00::1:4001:2:64",
        "tcpsend:p0>vm/ipv6/tcp:fd00::1:4001:50:64",
        "recv:vm>p0/ipv6:fd00::2:4001",
        "tcprecv:vm>p0/ipv6/tcp:fd00::2:4001",
    )


def test_the_same_question_gets_the_same_plan() -> None:
    assert plan_probe(VM, peers(7), rate=10_000, payload=200) == plan_probe(
        VM, peers(7), rate=10_000, payload=200
    )


def test_a_family_that_one_end_lacks_is_left_out_and_takes_no_rate() -> None:
    only4 = Node(name="old", ipv4="10.0.0.9")
    plan = plan_probe(VM, [only4, *peers(1)], rate=9, payload=200)
    assert flows_of(plan, "old") == (
        "send:old>vm/ipv4:10.0.0.1:20000:3:200",
        "recv:vm>old/ipv4:10.0.0.9:20000",
    )
    assert "send:p0>vm/ipv6:fd00::1:20003:3:200" in flows_of(plan, "p0")


@pytest.mark.parametrize(
    ("vm", "others", "rate", "payload", "port", "reason"),
    [
        (VM, peers(3), 5, 200, 20000, "cannot be shared"),
        (VM, [], 5, 200, 20000, "no address family in common"),
        (VM, [Node(name="p")], 5, 200, 20000, "no address family in common"),
        (VM, peers(1), 5, 31, 20000, "payload must be"),
        (VM, peers(1), 5, 9001, 20000, "payload must be"),
        (VM, peers(1), 5, 200, 65535, "ports from 65535"),
        (VM, peers(1), 5, 200, 0, "ports from 0"),
        (VM, [VM], 5, 200, 20000, "two nodes called vm"),
        (VM, [Node(name="a:b", ipv4="10.0.0.2")], 5, 200, 20000, "cannot be used"),
        (VM, [Node(name="", ipv4="10.0.0.2")], 5, 200, 20000, "cannot be used"),
        (VM, [Node(name="x" * 60, ipv4="10.0.0.2")], 5, 200, 20000, "longer than 63"),
        (VM, [Node(name="p", ipv4="fd00::2")], 5, 200, 20000, "not an IPv4 address"),
        (VM, [Node(name="p", ipv6="nonsense")], 5, 200, 20000, "not an IPv6 address"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_with_a_reason(
    vm: Node, others: list[Node], rate: int, payload: int, port: int, reason: str
) -> None:
    with pytest.raises(PlanError, match=reason):
        plan_probe(vm, others, rate=rate, payload=payload, base_port=port)
