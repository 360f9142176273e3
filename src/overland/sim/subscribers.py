"""What the NVA tells each NVE of the VN: daemon/nva.py's part between `VnView` and `Pushes`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from overland.nva.authority import Authority
from overland.nva.mapping import VnView
from overland.nva.pushes import Pushes, Update, Whole
from overland.sim.domain import NETWORK
from overland.sim.kernel import Failures

if TYPE_CHECKING:
    from overland.sim.host import SimHost


class Subscribers:
    """One NVA's life: `send` puts a push on the wire; `revision` is the first one."""

    def __init__(
        self,
        authority: Authority,
        hosts: list[SimHost],
        send: Callable[[SimHost, Whole | Update], None],
        revision: int,
    ) -> None:
        self._authority = authority
        self._hosts = hosts
        self._send = send
        self._pushes = Pushes(revision)

    def view(self) -> VnView:
        """The VN as the NVA has it now."""
        cluster = self._authority.cluster
        return VnView(cluster, cluster.networks[NETWORK])

    def changed(self) -> None:
        """Tell everybody who is there what is news to him."""
        view = self.view()
        for host in self._hosts:
            if host.connected:
                self._push(host, view)

    def connected(self, host: SimHost, known: dict[str, int]) -> None:
        self._pushes.has(host.name, known)
        self._push(host, self.view(), again=True)

    def asked(self, host: SimHost) -> None:
        """It cannot go on from what it was sent."""
        self._pushes.void(host.name, NETWORK)
        self._push(host, self.view())

    def acknowledged(self, host: SimHost, push: Whole | Update, failures: Failures) -> None:
        if failures:
            self._pushes.void(host.name, NETWORK)
        else:
            self._pushes.acknowledged(host.name, NETWORK, push.revision)

    def in_kernel(self, host: SimHost) -> VnView | None:
        """The VN as the NVE's kernel is known to have it."""
        return self._pushes.in_kernel(host.name, NETWORK)

    def _push(self, host: SimHost, view: VnView, *, again: bool = False) -> None:
        push = self._pushes.news(host.name, NETWORK, view, again=again)
        if push is not None:
            self._send(host, push)

    def found(self) -> None:
        """Everybody has it all, since long."""
        view = self.view()
        for host in self._hosts:
            push = self._pushes.news(host.name, NETWORK, view)
            assert isinstance(push, Whole)
            assert push.intent is not None
            host.agent.founded(push.intent, push.revision)
            self._pushes.acknowledged(host.name, NETWORK, push.revision)
