"""The verdict is ok exactly when the network kept every packet, and its counts are exact."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overland.probe.report import (
    Flow,
    NodeReport,
    Recv,
    ReportError,
    Send,
    TcpRecv,
    TcpSend,
    parse_report,
)
from overland.probe.verdict import Verdict, judge


def observe(id: str, arrivals: list[int]) -> Recv:
    """What a receiver reports of these numbers, in the plainest possible way."""
    first: dict[int, int] = {}
    for position, seq in enumerate(arrivals):
        first.setdefault(seq, position)
    late = sum(any(seq < other for other in arrivals[: first[seq]]) for seq in first)
    return Recv(
        id=id,
        received=len(arrivals),
        unique=len(first),
        duplicated=len(arrivals) - len(first),
        out_of_order=late,
        highest_seq=max(arrivals, default=None),
    )


def verdict_of(*flows: Flow, expected: tuple[str, ...] = ()) -> Verdict:
    nodes = [NodeReport(name=f"n{index}", flows=(flow,)) for index, flow in enumerate(flows)]
    return judge(nodes, expected=expected)


@st.composite
def networks(draw: st.DrawFn) -> tuple[int, set[int], list[int], list[int]]:
    """How many were sent, which were dropped, which repeated, and the order of arrival."""
    sent = draw(st.integers(min_value=1, max_value=40))
    numbers = st.integers(min_value=0, max_value=sent - 1)
    dropped = draw(st.sets(numbers))
    kept = [seq for seq in range(sent) if seq not in dropped]
    repeated = draw(st.lists(st.sampled_from(kept), max_size=5)) if kept else []
    arrivals = draw(st.permutations(kept + repeated))
    return sent, dropped, repeated, arrivals


@given(networks())
def test_counts_are_those_of_the_network(
    network: tuple[int, set[int], list[int], list[int]],
) -> None:
    sent, dropped, repeated, arrivals = network
    verdict = verdict_of(Send(id="f", sent=sent), observe("f", arrivals))
    flow = verdict.flows[0]
    assert flow.sent == sent
    assert flow.lost == len(dropped)
    assert flow.duplicated == len(repeated)
    assert verdict.ok == (arrivals == list(range(sent)))
    assert (flow.out_of_order == 0) == (list(dict.fromkeys(arrivals)) == sorted(set(arrivals)))


@given(st.lists(networks(), min_size=1, max_size=5))
def test_the_total_is_the_sum_and_the_order_of_reports_does_not_matter(
    runs: list[tuple[int, set[int], list[int], list[int]]],
) -> None:
    flows: list[Flow] = []
    for index, (sent, _, _, arrivals) in enumerate(runs):
        flows += [Send(id=f"f{index}", sent=sent), observe(f"f{index}", arrivals)]
    verdict = verdict_of(*flows)
    total = verdict.total
    assert total.sent == sum(sent for sent, *_ in runs)
    assert total.lost == sum(len(dropped) for _, dropped, *_ in runs)
    assert total.duplicated == sum(len(repeated) for _, _, repeated, _ in runs)
    assert total.ok == verdict.ok
    assert verdict == verdict_of(*reversed(flows))


def clean_udp(id: str = "f", count: int = 10) -> tuple[Send, Recv]:
    return Send(id=id, sent=count), observe(id, list(range(count)))


def clean_tcp(id: str = "t", count: int = 10) -> tuple[TcpSend, TcpRecv]:
    return (
        TcpSend(id=id, sent=count, survived=True),
        TcpRecv(id=id, received=count, survived=True, connections=1),
    )


def test_a_clean_run_is_ok() -> None:
    verdict = verdict_of(*clean_udp(), *clean_tcp(), expected=("f", "t"))
    assert verdict.ok
    assert verdict.total.ok


def test_no_flow_at_all_is_not_ok() -> None:
    assert not judge([]).ok


def test_a_flow_on_which_nothing_went_is_not_ok() -> None:
    assert not verdict_of(Send(id="f", sent=0), observe("f", [])).ok


@pytest.mark.parametrize(
    "change", [{"socket_drops": 1}, {"corrupt": 1}, {"duplicated": 1}, {"out_of_order": 1}]
)
def test_each_single_fault_at_the_receiver_fails(change: dict[str, int]) -> None:
    send, recv = clean_udp()
    assert not verdict_of(send, msgspec.structs.replace(recv, **change)).ok


def test_a_drop_at_the_tool_is_told_apart() -> None:
    send, recv = Send(id="f", sent=3), observe("f", [0, 1])
    flow = verdict_of(send, msgspec.structs.replace(recv, socket_drops=1)).flows[0]
    assert (flow.lost, flow.tool_dropped) == (1, 1)


def test_a_refused_and_repeated_send_is_shown_but_harmless() -> None:
    send, recv = clean_udp()
    verdict = verdict_of(msgspec.structs.replace(send, send_errors=4), recv)
    assert verdict.ok
    assert verdict.total.send_errors == 4


@pytest.mark.parametrize("missing", [0, 1])
def test_a_flow_with_one_end_is_not_ok(missing: int) -> None:
    for ends in (clean_udp(), clean_tcp()):
        verdict = verdict_of(ends[1 - missing])
        assert not verdict.ok
        assert "no report of its" in verdict.flows[0].problem


def test_an_end_reported_twice_is_not_ok() -> None:
    send, recv = clean_udp()
    assert "2 reports of its sender" in verdict_of(send, send, recv).flows[0].problem


def test_more_received_than_sent_is_not_ok() -> None:
    verdict = verdict_of(Send(id="f", sent=1), observe("f", [0, 1]))
    assert verdict.flows[0].lost == 0
    assert "1 more received than sent" in verdict.flows[0].problem


def test_an_expected_flow_that_nobody_reports_is_not_ok() -> None:
    verdict = verdict_of(*clean_udp(), expected=("f", "g"))
    assert not verdict.ok
    assert [flow.id for flow in verdict.flows if not flow.ok] == ["g"]


def test_a_broken_stream_is_not_ok_and_says_why() -> None:
    send, recv = clean_tcp()
    broken = msgspec.structs.replace(send, survived=False, error="Broken pipe")
    verdict = verdict_of(broken, recv)
    assert not verdict.ok
    assert verdict.flows[0].problem == "the connection broke (Broken pipe)"


@pytest.mark.parametrize("change", [{"sequence_errors": 1}, {"content_errors": 1}, {"received": 9}])
def test_each_single_fault_of_a_stream_fails(change: dict[str, int]) -> None:
    send, recv = clean_tcp()
    assert not verdict_of(send, msgspec.structs.replace(recv, **change)).ok


def test_retransmits_are_counted_and_harmless() -> None:
    send, recv = clean_tcp()
    verdict = verdict_of(msgspec.structs.replace(send, retransmits=3), recv)
    assert verdict.ok
    assert verdict.total.retransmits == 3


def test_rows_have_a_heading_and_a_total_and_gaps_in_milliseconds() -> None:
    send, recv = clean_udp()
    rows = verdict_of(send, msgspec.structs.replace(recv, longest_gap_ns=12_345_678)).rows()
    assert [row[0] for row in rows] == ["flow", "f", "total"]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert dict(zip(rows[0], rows[1], strict=True))["longest gap ms"] == "12.3"


def test_a_report_survives_the_wire() -> None:
    report = NodeReport(name="n", flows=(*clean_udp(), *clean_tcp()))
    assert parse_report(msgspec.json.encode(report)) == report


@pytest.mark.parametrize("data", [b"", b"{}", b'{"name":"n","flows":[{"kind":"what","id":"x"}]}'])
def test_what_is_no_report_is_refused(data: bytes) -> None:
    with pytest.raises(ReportError, match="not a probe report"):
        parse_report(data)
