"""The compiled helper counts exactly, on loopback and between two network namespaces."""

import os
import random
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overland.probe.build import helper_path
from overland.probe.plan import Node, plan_probe
from overland.probe.report import NodeReport, Recv, Send, TcpRecv, TcpSend, read_report
from overland.probe.verdict import judge

DATA, HELLO = 1, 2
T = TypeVar("T")


class Running:
    """One helper process, killed when the block ends if it still runs."""

    def __init__(self, helper: Path, out: Path, args: Sequence[str], prefix: Sequence[str]) -> None:
        self.out = out
        self.process = subprocess.Popen(
            [*prefix, str(helper), "run", "--name", out.stem, "--out", str(out), *args],
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        self.wait_for("ready")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def wait_for(self, line: str) -> None:
        assert self.process.stdout is not None
        for said in self.process.stdout:
            if said.strip() == line:
                return
        raise AssertionError(f"the helper ended without saying {line}")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def report(self) -> NodeReport:
        """The report of a helper that exits by itself."""
        assert self.process.wait(timeout=30) == 0
        return read_report(self.out)

    def finish(self) -> NodeReport:
        self.signal(signal.SIGTERM)
        return self.report()


Start = Callable[..., Running]


@pytest.fixture(scope="module")
def helper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helper_path(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def start(helper: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    def run(name: str, *args: str, prefix: Sequence[str] = ()) -> Running:
        return Running(helper, tmp_path_factory.mktemp("run") / f"{name}.json", args, prefix)

    return run


@pytest.fixture(scope="module")
def port() -> int:
    """A port that is free, so that two runs of the tests on one machine do not meet."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as trial:
        trial.bind(("::", 0))
        return int(trial.getsockname()[1])


def datagram(flow: str, seq: int, *, payload: bytes = b"", kind: int = DATA) -> bytes:
    mark = 0xCBF29CE484222325
    for byte in flow.encode():
        mark = (mark ^ byte) * 0x100000001B3 % 2**64
    size = 32 + len(payload)
    return struct.pack(">IHHQQQ", 0x4F564C50, kind, size, mark, seq, time.time_ns()) + payload


def receive(start: Start, port: int, datagrams: Sequence[bytes]) -> Recv:
    """What the helper reports of these datagrams; loopback delivers before `sendto` returns."""
    with (
        start("r", f"recv:f:127.0.0.1:{port}") as running,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out,
    ):
        for data in datagrams:
            out.sendto(data, ("127.0.0.1", port))
        flow = running.finish().flows[0]
    assert isinstance(flow, Recv)
    return flow


def only(kind: type[T], report: NodeReport) -> list[T]:
    return [flow for flow in report.flows if isinstance(flow, kind)]


def holes(arrivals: Sequence[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for seq in sorted(set(range(max(arrivals))) - set(arrivals)):
        if ranges and ranges[-1][1] == seq - 1:
            ranges[-1] = (ranges[-1][0], seq)
        else:
            ranges.append((seq, seq))
    return ranges[:64]


@settings(max_examples=25, deadline=None)
@given(
    arrivals=st.lists(st.integers(min_value=0, max_value=300), min_size=1, max_size=400),
)
def test_any_order_of_arrival_is_counted_exactly(
    start: Start, port: int, arrivals: list[int]
) -> None:
    flow = receive(start, port, [datagram("f", seq) for seq in arrivals])
    first: dict[int, int] = {}
    for position, seq in enumerate(arrivals):
        first.setdefault(seq, position)
    late = sum(seq < max(arrivals[: at + 1]) for seq, at in first.items())
    assert flow.received == len(arrivals)
    assert flow.unique == len(first)
    assert flow.duplicated == len(arrivals) - len(first)
    assert flow.out_of_order == late
    assert flow.highest_seq == max(arrivals)
    assert flow.missing_below_highest == max(arrivals) + 1 - len(first)
    assert list(flow.missing_ranges) == holes(arrivals)
    assert flow.socket_drops == 0


def test_the_record_of_numbers_grows(start: Start, port: int) -> None:
    high = 5_000_000
    flow = receive(start, port, [datagram("f", seq) for seq in (0, high, 1, high, high + 1)])
    assert (flow.unique, flow.duplicated, flow.out_of_order) == (4, 1, 1)
    assert flow.missing_ranges == ((2, high - 1),)


def test_what_is_not_of_the_flow_is_told_apart(start: Start, port: int) -> None:
    flow = receive(
        start,
        port,
        [
            datagram("f", 0),
            datagram("f", 0, kind=HELLO),
            datagram("other", 1),
            b"noise",
            datagram("f", 1, payload=b"wrong content"),
            datagram("f", 1) + b"too long",
            datagram("f", 2**63),
        ],
    )
    assert (flow.received, flow.hellos, flow.alien, flow.corrupt) == (1, 1, 2, 3)


def test_the_longest_gap_and_its_end_are_measured(start: Start, port: int) -> None:
    with (
        start("r", f"recv:f:127.0.0.1:{port}") as running,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out,
    ):
        out.sendto(datagram("f", 0), ("127.0.0.1", port))
        opened = time.time_ns()
        time.sleep(0.03)  # the silence itself is what the test is about
        out.sendto(datagram("f", 1), ("127.0.0.1", port))
        closed = time.time_ns()
        (flow,) = only(Recv, running.finish())
    assert flow.longest_gap_ns >= 30_000_000
    assert opened <= flow.longest_gap_at_ns <= closed
    assert [(gap.gap_ns, gap.at_ns, gap.after_seq) for gap in flow.gaps] == [
        (flow.longest_gap_ns, flow.longest_gap_at_ns, 0)
    ]


def test_the_loss_of_a_stalled_receiver_is_the_tools_own(start: Start, port: int) -> None:
    at = f"127.0.0.1:{port}"
    with start("r", f"recv:f:{at}") as receiver:
        receiver.signal(signal.SIGSTOP)
        with start("s", "--duration", "1", "--settle", "0", f"send:f:{at}:20000:9000") as sender:
            sent = sender.report()
        receiver.signal(signal.SIGCONT)
        received = receiver.finish()
    (result,) = judge([sent, received]).flows
    assert result.lost == result.tool_dropped > 0
    assert not result.ok


def test_faults_on_purpose_are_counted_exactly(start: Start, port: int) -> None:
    flows = [("a", f"127.0.0.1:{port}"), ("b", f"::1:{port}")]
    faults = [
        *("--skip-seq", "3", "--skip-seq", "4"),
        *("--dup-seq", "10", "--swap-seq", "20", "--swap-seq", "30"),
    ]
    with start("r", *(f"recv:{id}:{at}" for id, at in flows)) as receiver:
        sends = (f"send:{id}:{at}:500:100" for id, at in flows)
        with start("s", "--duration", "1", "--settle", "0", *faults, *sends) as sender:
            sent = sender.report()
        verdict = judge([sent, receiver.finish()])
    assert [flow.id for flow in verdict.flows] == ["a", "b"]
    for flow in verdict.flows:
        assert (flow.lost, flow.duplicated, flow.out_of_order) == (2, 1, 2)
        assert flow.received == flow.sent - 2 + 1


def test_a_stream_whose_peer_dies_did_not_survive(start: Start, port: int) -> None:
    at = f"127.0.0.1:{port}"
    with (
        start("r", f"tcprecv:t:{at}") as receiver,
        start("s", "--duration", "1", "--settle", "0", f"tcpsend:t:{at}:1000:100") as sender,
    ):
        sender.wait_for("heard")
        receiver.process.kill()
        (end,) = only(TcpSend, sender.report())
    assert not end.survived
    assert end.error


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["send:f:127.0.0.1:1:0:100"], "RATE must be"),
        (["send:f:127.0.0.1:1:5:31"], "SIZE must be"),
        (["recv:f:localhost:1"], "neither an IPv4 nor an IPv6 address"),
        (["recv:f:127.0.0.1:70000"], "PORT must be"),
        (["recv:f"], "too few fields"),
        (["what:f:127.0.0.1:1"], "the kind must be"),
        (['recv:"f":127.0.0.1:1'], "may not contain"),
        (["--nonsense"], "no option"),
        ([], "no FLOW"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    helper: Path, tmp_path: Path, args: list[str], reason: str
) -> None:
    command = [str(helper), "run", "--name", "n", "--out", str(tmp_path / "r.json"), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


class Pair:
    """Two network namespaces joined by a veth."""

    def __init__(self) -> None:
        tag = f"{os.getpid()}-{random.getrandbits(24):06x}"
        self.names = (f"ovtest-probe-a-{tag}", f"ovtest-probe-b-{tag}")
        self.nodes = tuple(
            Node(name=name, ipv4=f"198.18.77.{n}", ipv6=f"fd77::{n}")
            for n, name in enumerate(("a", "b"), start=1)
        )

    def inside(self, index: int) -> list[str]:
        return ["ip", "netns", "exec", self.names[index]]

    def create(self) -> None:
        for name in self.names:
            run("ip", "netns", "add", name)
        peer = ("type", "veth", "peer", "name", "v0", "netns", self.names[1])
        run("ip", "-n", self.names[0], "link", "add", "v0", *peer)
        for name, node in zip(self.names, self.nodes, strict=True):
            run("ip", "-n", name, "address", "add", f"{node.ipv4}/24", "dev", "v0")
            run("ip", "-n", name, "address", "add", f"{node.ipv6}/64", "dev", "v0", "nodad")
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "link", "set", "v0", "up")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def run(*command: str, text: str | None = None) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    try:
        made.create()
        yield made
    finally:
        made.remove()


def exchange(start: Start, pair: Pair, *options: str, rate: int) -> tuple[NodeReport, NodeReport]:
    """Both ends wait until they hear each other, run, and end by themselves."""
    plan = plan_probe(pair.nodes[0], pair.nodes[1:], rate=rate, payload=200, tcp=True)
    a, b = plan.nodes
    common = ("--hold", "--settle", "300", *options)
    with (
        start("a", *common, *a.flows, prefix=pair.inside(0)) as first,
        start("b", *common, *b.flows, prefix=pair.inside(1)) as second,
    ):
        for running in (first, second):
            running.wait_for("heard")
        for running in (first, second):
            running.signal(signal.SIGUSR2)
        return first.report(), second.report()


@pytest.mark.root
def test_ten_thousand_packets_per_second_each_way_without_loss(start: Start, pair: Pair) -> None:
    reports = exchange(start, pair, "--duration", "3", rate=10_000)
    verdict = judge(reports)
    assert len(verdict.flows) == 8
    assert verdict.ok, "\n".join(map(str, verdict.rows()))
    for report in reports:
        assert sum(flow.sent for flow in only(Send, report)) >= 29_000
        assert sum(flow.sent for flow in only(TcpSend, report)) >= 250
        assert all(flow.survived for flow in only(TcpRecv, report))
        assert all(flow.longest_gap_ns > 0 for flow in only(Recv, report))


@pytest.mark.root
def test_a_known_packet_dropped_by_the_network_is_found(start: Start, pair: Pair) -> None:
    # The low half of the sequence number lies 28 bytes into the UDP datagram.
    run(
        *pair.inside(1),
        *("nft", "-f", "-"),
        text="table inet t { chain c { type filter hook input priority 0; policy accept;"
        " meta l4proto udp @th,224,32 { 100, 101, 500 } drop; }; }",
    )
    first, second = exchange(start, pair, "--duration", "1", "--dup-seq", "200", rate=4_000)
    verdict = judge([first, second])
    for flow in verdict.flows:
        if flow.protocol == "tcp":
            assert flow.ok, flow
        else:
            assert flow.lost == (3 if flow.id.startswith("a>b") else 0)
            assert (flow.duplicated, flow.out_of_order, flow.tool_dropped) == (1, 0, 0)
    for recv in only(Recv, second):
        assert recv.missing_ranges == ((100, 101), (500, 500))


@pytest.mark.root
def test_a_sender_stopped_by_signal_still_receives(start: Start, pair: Pair) -> None:
    plan = plan_probe(pair.nodes[0], pair.nodes[1:], rate=1_000, payload=200)
    a, b = plan.nodes
    with (
        start("a", "--hold", *a.flows, prefix=pair.inside(0)) as first,
        start("b", "--hold", "--duration", "1", *b.flows, prefix=pair.inside(1)) as second,
    ):
        for running in (first, second):
            running.wait_for("heard")
        for running in (first, second):
            running.signal(signal.SIGUSR2)
        first.wait_for("sending")
        first.signal(signal.SIGUSR1)
        first.wait_for("stopped")
        reports = second.report(), first.finish()
    verdict = judge(reports)
    assert sum(flow.sent for flow in only(Send, reports[0])) >= 950
    assert sum(flow.sent for flow in only(Send, reports[1])) < 900
    assert all(flow.lost == 0 for flow in verdict.flows)
