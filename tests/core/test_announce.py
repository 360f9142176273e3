"""The courtesy announcements are what their RFCs say."""

from __future__ import annotations

from overland.dataplane.announce import (
    announcements,
    gratuitous_arp,
    reverse_arp,
    unsolicited_advertisement,
)

MAC = "02:00:00:00:00:01"


def test_gratuitous_arp_speaks_of_itself_to_everybody() -> None:
    frame = gratuitous_arp(MAC, "10.0.0.5")
    assert frame[:6] == b"\xff" * 6
    assert frame[12:14] == b"\x08\x06"
    assert frame[20:22] == b"\x00\x01"
    assert frame[28:32] == frame[38:42] == bytes([10, 0, 0, 5])


def test_neighbor_advertisement_goes_to_all_nodes_with_override_and_a_right_checksum() -> None:
    frame = unsolicited_advertisement(MAC, "fd00::5")
    assert frame[:6] == b"\x33\x33\x00\x00\x00\x01"
    packet = frame[14:]
    assert packet[24:40].hex() == "ff020000000000000000000000000001"
    assert packet[7] == 255
    body = packet[40:72]
    assert body[0] == 136
    assert body[4] == 0x20
    pseudo = packet[8:40] + len(body).to_bytes(4, "big") + bytes([0, 0, 0, 58])
    total = sum(
        int.from_bytes((pseudo + body)[i : i + 2], "big") for i in range(0, len(pseudo + body), 2)
    )
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert total == 0xFFFF


def test_reverse_arp_carries_the_mac_twice_and_no_address() -> None:
    frame = reverse_arp(MAC)
    assert frame[12:14] == b"\x80\x35"
    assert frame[20:22] == b"\x00\x03"
    assert frame[22:28] == frame[32:38] == bytes.fromhex("020000000001")
    assert frame[28:32] == frame[38:42] == b"\0" * 4


def test_only_addresses_that_exist_are_announced() -> None:
    assert len(announcements(MAC, ())) == 1
    assert len(announcements(MAC, ("10.0.0.5", "fd00::5"))) == 3
    both = ("10.0.0.5", "10.0.0.6")
    assert announcements(MAC, both)[1:] == [gratuitous_arp(MAC, each) for each in both]
