"""What the NVA tells each NVE of the VN: daemon/nva.py's part between `VnView` and `Pushes`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from overland.model.nve import VnIntent
from overland.nva.authority import Authority
from overland.nva.cluster import Cluster
from overland.nva.mapping import VnView
from overland.nva.pushes import Pushes, Update, Whole
from overland.sim.domain import NAMES, NETWORK, at_once, founded
from overland.sim.kernel import Failures
from overland.store.memory import MemoryStore

if TYPE_CHECKING:
    from overland.sim.host import SimHost


class FoundedView(VnView):
    """The VN as it is before the first move, in each seed alike: its intents are made once."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster, cluster.networks[NETWORK])
        self._intents = {name: super(FoundedView, self).intent(name) for name in NAMES}

    def intent(self, host: str) -> VnIntent:
        return self._intents[host]


@cache
def founded_view() -> FoundedView:
    store = MemoryStore()
    at_once(store.commit([], founded()))
    authority = Authority(store, lambda _: None)
    at_once(authority.load())
    return FoundedView(authority.cluster)


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
            if host.connection.up:
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
        view = founded_view()
        for host in self._hosts:
            push = self._pushes.news(host.name, NETWORK, view)
            assert isinstance(push, Whole)
            assert push.intent is not None
            host.agent.founded(push.intent, push.revision)
            self._pushes.acknowledged(host.name, NETWORK, push.revision)
