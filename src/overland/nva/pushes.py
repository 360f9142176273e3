"""What each NVE was told of each VN, and so what is news to it. Pure.

A push changes a revision that the NVE has, or is the whole. Kept is what was sent and not yet
acknowledged, and the last that was: the NVE may have any of these when it comes back (N-20).
"""

from __future__ import annotations

from collections.abc import Mapping

from overland.model.cluster import Record
from overland.model.nve import VnChange, VnIntent
from overland.nva.mapping import NOTHING, VnView


class Whole(Record, frozen=True, kw_only=True):
    """The VN as it must be; None: the NVE has no part in it (any more)."""

    revision: int
    intent: VnIntent | None
    versions: dict[str, int]


class Update(Record, frozen=True, kw_only=True):
    """What has changed since revision `base`."""

    base: int
    revision: int
    change: VnChange
    versions: dict[str, int]


class Pushes:
    """`revision` is the first one; those of a former NVA are behind it or are skipped."""

    def __init__(self, revision: int) -> None:
        self._revision = revision
        self._sent: dict[tuple[str, str], list[tuple[int, VnView]]] = {}
        self._has: dict[tuple[str, str], VnView] = {}

    def has(self, host: str, known: Mapping[str, int]) -> None:
        """The NVE is back, and says which revisions it has: from these it may go on."""
        # After a step of the clock a former NVA's revisions may be newer than ours.
        self._revision = max(self._revision, *known.values(), 0)
        for (name, network), sent in list(self._sent.items()):
            if name == host:
                self._has.pop((name, network), None)
                self._sent[host, network] = [at for at in sent if at[0] == known.get(network)]

    def acknowledged(self, host: str, network: str, revision: int) -> None:
        """The NVE's kernel has `revision`."""
        sent = self._sent.get((host, network), [])
        self._sent[host, network] = left = [at for at in sent if at[0] >= revision]
        if left and left[0][0] == revision:
            self._has[host, network] = left[0][1]
        else:
            self._has.pop((host, network), None)

    def in_kernel(self, host: str, network: str) -> VnView | None:
        """The VN as the NVE's kernel is known to have it; None when that is not known."""
        return self._has.get((host, network))

    def void(self, host: str, network: str) -> None:
        """What the NVE has is not what it was told: the next push is the whole."""
        self._sent.pop((host, network), None)
        self._has.pop((host, network), None)

    def news(
        self, host: str, network: str, view: VnView | None, *, again: bool = False
    ) -> Whole | Update | None:
        """The push that brings `host` to `view`; None when it has been told all of it.

        That an address is no longer in transit is told although nothing may be left to change (the
        VM has crashed meanwhile): its acknowledgement is waited for (HO-51).
        `view` is None when there is no such VN. `again`: its acknowledgement may have been lost,
        so there is a push in any case, with all versions.
        """
        sent = self._sent.get((host, network), [])
        if view is None or not view.includes(host):
            return self._whole(host, network, None) if sent or again else None
        if not sent:
            return self._whole(host, network, view)
        base, before = sent[-1]
        change = view.change(host, before)
        if change is None:
            return self._whole(host, network, view)
        same = change == NOTHING and view.markings == before.markings
        if same and not again:
            return None
        self._revision += 1
        sent.append((self._revision, view))
        versions = view.versions if again else view.versions_since(before)
        return Update(base=base, revision=self._revision, change=change, versions=versions)

    def _whole(self, host: str, network: str, view: VnView | None) -> Whole:
        self._revision += 1
        self._sent[host, network] = [(self._revision, view)] if view is not None else []
        if view is None:
            return Whole(revision=self._revision, intent=None, versions={})
        intent = view.intent(host)
        return Whole(revision=self._revision, intent=intent, versions=view.versions)
