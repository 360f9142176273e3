"""Joins the reports of all nodes and says, flow by flow, whether the network kept every packet."""

from collections.abc import Iterable, Sequence

import msgspec

from overland.probe.report import NodeReport, Recv, Send, TcpRecv, TcpSend

NS_PER_MS = 1_000_000


class FlowResult(msgspec.Struct, frozen=True, kw_only=True):
    """Both ends of one flow, compared. Counts are datagrams, or records of a TCP stream.

    `lost` are numbers that were sent and never arrived, whoever dropped them; `tool_dropped` says
    how many datagrams reached the receiving node and were dropped at the probe's own socket.
    `longest_gap_ms` is the receiver's longest silence in milliseconds. `send_errors` counts
    refused tries that were repeated with the same number; alone they do not fail a flow.
    `corrupted` arrived with wrong content. `problem` names what the counts cannot show, such as a
    missing report or a broken TCP connection, and is empty when there is nothing to say.
    """

    id: str
    protocol: str
    sent: int
    received: int
    lost: int
    duplicated: int
    out_of_order: int
    longest_gap_ms: float
    tool_dropped: int
    corrupted: int = 0
    send_errors: int = 0
    retransmits: int = 0
    problem: str = ""

    @property
    def ok(self) -> bool:
        """True iff something arrived and nothing was lost, repeated, reordered or damaged."""
        return (
            self.received > 0
            and not self.problem
            and not (self.lost or self.duplicated or self.out_of_order)
            and not (self.tool_dropped or self.corrupted)
        )


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """All flows of a run, ordered by id."""

    flows: tuple[FlowResult, ...]

    @property
    def ok(self) -> bool:
        """True iff there is at least one flow and every flow is ok."""
        return bool(self.flows) and all(flow.ok for flow in self.flows)

    @property
    def total(self) -> FlowResult:
        """The sums over all flows, and the longest gap of any, in milliseconds."""
        bad = sum(1 for flow in self.flows if flow.problem)
        return FlowResult(
            id="total",
            protocol="",
            sent=sum(flow.sent for flow in self.flows),
            received=sum(flow.received for flow in self.flows),
            lost=sum(flow.lost for flow in self.flows),
            duplicated=sum(flow.duplicated for flow in self.flows),
            out_of_order=sum(flow.out_of_order for flow in self.flows),
            longest_gap_ms=max((flow.longest_gap_ms for flow in self.flows), default=0.0),
            tool_dropped=sum(flow.tool_dropped for flow in self.flows),
            corrupted=sum(flow.corrupted for flow in self.flows),
            send_errors=sum(flow.send_errors for flow in self.flows),
            retransmits=sum(flow.retransmits for flow in self.flows),
            problem=f"{bad} flows with a problem" if bad else "",
        )

    def rows(self) -> list[tuple[str, ...]]:
        """A heading, one row per flow and the total, as text; gaps in milliseconds."""
        return [HEADING, *(_row(flow) for flow in self.flows), _row(self.total)]


HEADING = (
    "flow",
    "protocol",
    "sent",
    "received",
    "lost",
    "duplicated",
    "out of order",
    "longest gap ms",
    "tool dropped",
    "problem",
)


def _row(flow: FlowResult) -> tuple[str, ...]:
    return (
        flow.id,
        flow.protocol,
        str(flow.sent),
        str(flow.received),
        str(flow.lost),
        str(flow.duplicated),
        str(flow.out_of_order),
        f"{flow.longest_gap_ms:.1f}",
        str(flow.tool_dropped),
        flow.problem or (f"{flow.corrupted} corrupted" if flow.corrupted else ""),
    )


def judge(reports: Iterable[NodeReport], *, expected: Iterable[str] = ()) -> Verdict:
    """Join the sender and the receiver of each flow id and compare them.

    `expected` names flows that must be there: one that no report mentions fails the verdict, as
    otherwise a node whose report is missing altogether could hide its flows.
    """
    udp_out: dict[str, list[Send]] = {}
    udp_in: dict[str, list[Recv]] = {}
    tcp_out: dict[str, list[TcpSend]] = {}
    tcp_in: dict[str, list[TcpRecv]] = {}
    for report in reports:
        for flow in report.flows:
            match flow:
                case Send():
                    udp_out.setdefault(flow.id, []).append(flow)
                case Recv():
                    udp_in.setdefault(flow.id, []).append(flow)
                case TcpSend():
                    tcp_out.setdefault(flow.id, []).append(flow)
                case TcpRecv():
                    tcp_in.setdefault(flow.id, []).append(flow)
    udp = udp_out.keys() | udp_in.keys()
    tcp = tcp_out.keys() | tcp_in.keys()
    results = [_judge_udp(id, udp_out.get(id, []), udp_in.get(id, [])) for id in udp]
    results += [_judge_tcp(id, tcp_out.get(id, []), tcp_in.get(id, [])) for id in tcp]
    results += [_unreported(id) for id in set(expected) - udp - tcp]
    return Verdict(flows=tuple(sorted(results, key=lambda flow: (flow.id, flow.protocol))))


def _pairing_problem(senders: Sequence[object], receivers: Sequence[object]) -> str:
    problems = []
    for ends, name in ((senders, "sender"), (receivers, "receiver")):
        if not ends:
            problems.append(f"no report of its {name}")
        elif len(ends) > 1:
            problems.append(f"{len(ends)} reports of its {name}")
    return "; ".join(problems)


def _judge_udp(id: str, senders: Sequence[Send], receivers: Sequence[Recv]) -> FlowResult:
    sent = sum(end.sent for end in senders)
    unique = sum(end.unique for end in receivers)
    problem = _pairing_problem(senders, receivers)
    if not problem and unique > sent:
        problem = f"{unique - sent} more received than sent"
    return FlowResult(
        id=id,
        protocol="udp",
        sent=sent,
        received=sum(end.received for end in receivers),
        lost=max(0, sent - unique),
        duplicated=sum(end.duplicated for end in receivers),
        out_of_order=sum(end.out_of_order for end in receivers),
        longest_gap_ms=max((end.longest_gap_ns for end in receivers), default=0) / NS_PER_MS,
        tool_dropped=sum(end.socket_drops for end in receivers),
        corrupted=sum(end.corrupt for end in receivers),
        send_errors=sum(end.send_errors for end in senders),
        problem=problem,
    )


def _judge_tcp(id: str, senders: Sequence[TcpSend], receivers: Sequence[TcpRecv]) -> FlowResult:
    sent = sum(end.sent for end in senders)
    received = sum(end.received for end in receivers)
    problem = _pairing_problem(senders, receivers)
    if not problem and received > sent:
        problem = f"{received - sent} more received than sent"
    ends: tuple[TcpSend | TcpRecv, ...] = (*senders, *receivers)
    broken = [end for end in ends if not end.survived]
    if not problem and broken:
        reasons = sorted({end.error for end in broken if end.error})
        problem = "the connection broke" + (f" ({', '.join(reasons)})" if reasons else "")
    return FlowResult(
        id=id,
        protocol="tcp",
        sent=sent,
        received=received,
        lost=max(0, sent - received),
        duplicated=0,
        # A stream delivers in order or not at all: a wrong number means damaged content.
        out_of_order=0,
        longest_gap_ms=max((end.longest_gap_ns for end in receivers), default=0) / NS_PER_MS,
        tool_dropped=0,
        corrupted=sum(end.sequence_errors + end.content_errors for end in receivers),
        send_errors=sum(end.send_errors for end in senders),
        retransmits=sum(end.retransmits for end in senders),
        problem=problem,
    )


def _unreported(id: str) -> FlowResult:
    return FlowResult(
        id=id,
        protocol="",
        sent=0,
        received=0,
        lost=0,
        duplicated=0,
        out_of_order=0,
        longest_gap_ms=0.0,
        tool_dropped=0,
        problem="no report mentions it",
    )
