"""The JSON report that `overland-probe` writes on each node, as typed values.

Times called `*_ns` that name a moment are CLOCK_REALTIME of the reporting node, in nanoseconds
since the epoch, and 0 when the event never happened. All others are durations in nanoseconds.
"""

from pathlib import Path

import msgspec


class ReportError(Exception):
    """A report is missing or is not one of ours; the message is fit for the user."""


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """A silence of more than 5 ms between two arrivals of one flow.

    `at_ns` is the moment it ended, `after_seq` the number that arrived last before it.
    """

    at_ns: int
    gap_ns: int
    after_seq: int


class Send(msgspec.Struct, frozen=True, kw_only=True, tag="send", tag_field="kind"):
    """The sending end of a UDP flow.

    `sent` datagrams were taken by the local kernel, numbered from 0 without holes. A refused
    datagram counts in `send_errors` and keeps its number for the next try, so it is not lost.
    `longest_pause_ns` is the sender's own longest silence: a gap no longer than this at the
    receiver is not the network's doing. `schedule_slips` counts how often the sender fell more
    than a second behind its rate and gave the backlog up.
    """

    id: str
    sent: int
    send_errors: int = 0
    first_ns: int = 0
    last_ns: int = 0
    longest_pause_ns: int = 0
    longest_pause_at_ns: int = 0
    schedule_slips: int = 0


class Recv(msgspec.Struct, frozen=True, kw_only=True, tag="recv", tag_field="kind"):
    """The receiving end of a UDP flow.

    `received = unique + duplicated`. `out_of_order` follows RFC 4737: numbers that arrived for
    the first time after a higher one had. `socket_drops` are datagrams that reached this node and
    that its kernel dropped at the probe's own socket: the tool's loss, not the network's.
    `corrupt` had our header and a wrong length or payload, `alien` belonged to another flow;
    neither is in `received`. `min_delay_ns` and `max_delay_ns` compare two nodes' clocks.
    """

    id: str
    received: int
    unique: int
    duplicated: int
    out_of_order: int
    highest_seq: int | None = None
    missing_below_highest: int = 0
    missing_ranges: tuple[tuple[int, int], ...] = ()
    first_ns: int = 0
    last_ns: int = 0
    longest_gap_ns: int = 0
    longest_gap_at_ns: int = 0
    gaps: tuple[Gap, ...] = ()
    min_delay_ns: int | None = None
    max_delay_ns: int | None = None
    socket_drops: int = 0
    corrupt: int = 0
    alien: int = 0
    hellos: int = 0


class TcpSend(msgspec.Struct, frozen=True, kw_only=True, tag="tcpsend", tag_field="kind"):
    """The sending end of a TCP stream of numbered records.

    `sent` records were taken by the local kernel in full; `unacked_bytes` of them the peer had not
    acknowledged at the end. `retransmits` is the kernel's count of segments sent again.
    `survived` tells that the one connection stood from its first byte to the end of the run.
    """

    id: str
    sent: int
    survived: bool
    send_errors: int = 0
    first_ns: int = 0
    last_ns: int = 0
    longest_pause_ns: int = 0
    longest_pause_at_ns: int = 0
    schedule_slips: int = 0
    retransmits: int = 0
    unacked_bytes: int = 0
    error: str = ""


class TcpRecv(msgspec.Struct, frozen=True, kw_only=True, tag="tcprecv", tag_field="kind"):
    """The receiving end of a TCP stream of numbered records.

    `sequence_errors` counts records whose number was not the one expected, `content_errors` those
    with a wrong payload. More than one of `connections` means that the stream broke.
    """

    id: str
    received: int
    survived: bool
    sequence_errors: int = 0
    content_errors: int = 0
    connections: int = 0
    error: str = ""
    first_ns: int = 0
    last_ns: int = 0
    longest_gap_ns: int = 0
    longest_gap_at_ns: int = 0
    gaps: tuple[Gap, ...] = ()


Flow = Send | Recv | TcpSend | TcpRecv


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one node sent and received."""

    name: str
    flows: tuple[Flow, ...]


def parse_report(data: bytes) -> NodeReport:
    """Decode the JSON of one node, or raise `ReportError`."""
    try:
        return msgspec.json.decode(data, type=NodeReport)
    except msgspec.DecodeError as error:
        raise ReportError(f"this is not a probe report: {error}") from error


def read_report(path: Path) -> NodeReport:
    """Read the report file of one node, or raise `ReportError`."""
    try:
        return parse_report(path.read_bytes())
    except OSError as error:
        raise ReportError(f"cannot read the probe report {path}: {error.strerror}") from error
