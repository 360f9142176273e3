"""A connection that must live through moves."""

from __future__ import annotations

import socket
import threading
from typing import Any

from overland.dataplane.namespace import inside, path_of


class Talk(threading.Thread):
    """One TCP connection from `namespace` with a question and its answer all the time."""

    def __init__(self, namespace: str, address: str, port: int) -> None:
        super().__init__()
        with inside(path_of(namespace)):
            self.socket = socket.create_connection((address, port), timeout=20)
        self.answers, self.over, self.failure = 0, threading.Event(), ""

    def run(self) -> None:
        try:
            while not self.over.is_set():
                question = f"{self.answers:08d}".encode()
                self.socket.sendall(question)
                answer = b""
                while len(answer) < len(question):
                    answer += self.socket.recv(100) or b"closed"
                assert answer == question
                self.answers += 1
        except (OSError, AssertionError) as failure:
            self.failure = repr(failure)

    def ends(self) -> tuple[Any, Any]:
        """Both addresses as an application sees them (R-26)."""
        return self.socket.getsockname(), self.socket.getpeername()
