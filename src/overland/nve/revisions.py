"""Which revision of each VN this NVE has, and whether a message goes with it. No I/O.

What contradicts what an NVE has is never believed and never guessed around: the NVA is asked for
the whole, once, and until it answers nothing of that VN changes here (E-02, ADR 0017).
"""

from __future__ import annotations

from typing import Literal

Judgement = Literal["take", "skip", "ask"]
"""`ask`: have the NVA say the whole; `skip`: nothing new, or it was asked already."""


class Revisions:
    """By VN, `known` is what is in the kernel, `newest` what was heard: some of it still waits.

    A restarted NVE knows nothing.
    """

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self.newest: dict[str, int] = {}
        self._held: set[str] = set()
        self._asked: set[str] = set()

    def heard(self, network: str, revision: int) -> None:
        """A push has come: the NVA hears of it, and gives its number to no other (HO-54).

        It waits for its turn across a new connection, and what a restarted NVA says with the same
        number would be taken for it.
        """
        self.newest[network] = max(revision, self.newest.get(network, 0))

    def judge(self, network: str, revision: int, base: int | None) -> Judgement:
        """What to do with a push of `revision`; `base` is what it changes, None for the whole."""
        if revision <= self.known.get(network, 0):
            return "skip"
        if base is None:
            self._asked.discard(network)
            return "take"
        if network in self._held and self.known[network] == base:
            return "take"
        if network in self._asked:
            return "skip"
        self._asked.add(network)
        return "ask"

    def applied(self, network: str, revision: int, *, held: bool) -> None:
        """The kernel has `revision`; not `held`: by it this NVE has no part in the VN any more."""
        self.known[network] = revision
        (self._held.add if held else self._held.discard)(network)

    def connected(self) -> None:
        """A new connection: a question on the old one may not have arrived."""
        self._asked.clear()
