"""The QEMU command line of a VM. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overland.hypervisor.mirror import tls_id
from overland.model.cluster import PLUGGABLE, Disk, Interface, Vm, numbered

RX_QUEUE_FRAMES = 1024
"""The longest receive queue of virtio-net: what the guest cannot take yet waits there."""

FIRST_DISK, FIRST_INTERFACE = 0x8, 0x10
"""PCI slots of the first disk and of the interface with slot 0."""


def qemu_command(
    binary: str,
    vm: Vm,
    accelerator: str,
    taps: Sequence[int],
    run_dir: Path,
    *,
    files: Sequence[Mapping[str, Any]],
    tls: Path | None,
    firmware: Path | None,
    incoming: bool,
) -> list[str]:
    """Return the arguments that start `vm`; `taps` are inherited descriptors, one an interface.

    `files` are QEMU's descriptions of what lies below each disk, in order. `tls` is a folder with
    our certificate, when one of them is reached over the network.

    `firmware` is a file to use in place of QEMU's own.

    The same VM gives the same machine on every host (fixed addresses, named machine version, no
    option ROMs), which is what a migration needs.
    """
    command = [
        binary,
        *("-name", f"overland-{vm.name},process=overland-{vm.name[:6]}"),
        *("-M", vm.machine),
        *("-accel", "kvm" if accelerator == "kvm" else "tcg,thread=multi"),
        *("-cpu", vm.cpu),
        *("-m", f"{vm.memory_mib}M"),
        *("-smp", str(vm.vcpus)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-qmp", f"unix:{run_dir}/qmp.sock,server=on,wait=off"),
        *("-chardev", f"file,id=log,path={run_dir}/serial.log,append=on", "-serial", "chardev:log"),
        *("-chardev", f"socket,id=console,path={run_dir}/console.sock,server=on,wait=off"),
        *("-serial", "chardev:console"),
    ]
    for (slot, interface), fd in zip(numbered(vm), taps, strict=True):
        command += ["-netdev", json.dumps(backend(slot, str(fd)))]
        device = interface_device(slot, interface)
        if incoming and not vm.machine.startswith(PLUGGABLE):
            device["guest_announce"] = True  # it may have begun with that, and wants what it had
        command += ["-device", json.dumps(device)]
    if firmware is not None:
        command += ["-bios", str(firmware)]
    command += _boot(vm)
    if tls is not None:
        who = f"id={tls_id('client')},endpoint=client,dir={tls},verify-peer=on"
        command += ["-object", f"tls-creds-x509,{who}"]
    for index, (disk, file) in enumerate(zip(vm.disks, files, strict=True)):
        command += _disk(index, disk, file, boots=disk.path == vm.boot.image)
    if incoming:
        command += ["-S", "-incoming", "defer"]
    return command


def device_id(slot: int) -> str:
    """QEMU's name of the device of the interface in `slot`."""
    return f"nic{slot}"


def backend_id(slot: int) -> str:
    """QEMU's name of what is behind that device."""
    return f"net{slot}"


def backend(slot: int, descriptor: str) -> dict[str, str]:
    """What is behind an interface's device; `descriptor` is a number, or a name given before."""
    return {"type": "tap", "id": backend_id(slot), "fd": descriptor}


def interface_device(slot: int, interface: Interface) -> dict[str, Any]:
    """An interface's device: the same for a machine that starts as for one that takes it later.

    Guests are not asked to announce themselves after a move: the NVE does that. And after a move
    without announcements (HO-13) QEMU 7.2 dies when a guest that could be asked resets its device,
    as it does when it lets go of it.
    """
    return {
        "driver": "virtio-net-pci",
        "id": device_id(slot),
        "netdev": backend_id(slot),
        "mac": interface.mac,
        "romfile": "",
        "rx_queue_size": RX_QUEUE_FRAMES,
        "guest_announce": False,
        "addr": f"{FIRST_INTERFACE + slot:#x}",
    }


def _boot(vm: Vm) -> list[str]:
    boot = vm.boot
    if boot.kernel:
        initrd = ["-initrd", boot.initrd] if boot.initrd else []
        return ["-kernel", boot.kernel, *initrd, "-append", boot.append]
    return []


def disk_node(index: int) -> str:
    """The name of a disk's block node, and of what is made of it."""
    return f"disk{index}"


def _disk(index: int, disk: Disk, file: Mapping[str, Any], *, boots: bool) -> list[str]:
    # The host that has an image gives what is in it, whatever its format.
    driver = "raw" if disk.uri else disk.format
    node = {"driver": driver, "node-name": disk_node(index), "file": file}
    if disk.kind == "moved" and not disk.uri:
        node |= {"discard": "unmap", "detect-zeroes": "unmap"}  # holes stay holes
    device = f"virtio-blk-pci,drive={disk_node(index)},id=blk{index},addr={FIRST_DISK + index:#x}"
    if boots:
        device += ",bootindex=1"
    return ["-blockdev", json.dumps(node), "-device", device]
