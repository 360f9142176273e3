"""Does a host's kernel still answer on the underlay, whatever has become of its daemons? (N-11)"""

from __future__ import annotations

import asyncio

from overland.dataplane.pathframe import VXLAN_PORT

TRIES, TRY_S = 3, 0.5


async def answers(address: str) -> bool:
    """Tell whether the host at `address` accepts a TCP connection, or refuses one.

    Either is its kernel's own answer. Nobody listens on VXLAN's port over TCP, and a fabric that
    carries VXLAN has no reason to hide the port.
    """
    for _ in range(TRIES):
        try:
            async with asyncio.timeout(TRY_S):
                _, writer = await asyncio.open_connection(address, VXLAN_PORT)
        except ConnectionRefusedError:
            return True
        except (OSError, TimeoutError):
            continue
        writer.close()
        return True
    return False
