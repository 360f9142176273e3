"""What the NVA knows: hosts, networks, machines, and where each tenant address is.

Frozen value types that are also the stored and the transmitted form (ADR 0003). A record has one
writer, the NVA's authority; everyone else sends wishes or facts.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from overland.model.names import port_name

Family = Literal["ipv4", "ipv6"]
VmState = Literal[
    "preparing",
    "running",
    "suspending",
    "suspended",
    "resuming",
    "paused",
    "migrating",
    "shutdown",
    "crashed",
    "blocked",
]
"""RFC 7666 (vmOperState) names, those that we can reach."""


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """Base of every stored value: immutable, keyword-only."""


class Network(Record, frozen=True, kw_only=True):
    """A virtual network (VN). `mtu` is what tenants may use, in bytes."""

    name: str
    vni: int
    kind: Literal["l2", "l3", "ila"] = "l2"
    ipv4: str | None = None
    ipv6: str | None = None
    mtu: int = 1500
    underlay: Family = "ipv4"


GUEST_PAUSE = "guest pause by QEMU"
"""The whole guest stands still and notices nothing but time; no stack and no application helps."""


class Host(Record, frozen=True, kw_only=True):
    """A machine with an NVE. `ready` while its NVE holds its lease at the NVA.

    `dead`: its lease has ended and no other host reaches it either; nobody is told of what it has.
    `connected_ns`: when its NVE said Hello (CLOCK_REALTIME), 0 while it is not connected.
    `answers`: its kernel is known to answer others on the underlay, so silence means something.
    `storage_port`: where it offers images that VMs have left behind (TCP).
    `pauses_by` names what lets a connection pause while its VM moves hot; empty: cold moves only
    (R-32). `locator` is the /64 that leads to it in VNs of kind `ila`. `blockers` are the NVE's own
    reasons why nothing can run there (no VXLAN, no QEMU, not root).
    """

    name: str
    underlay_ipv4: str | None = None
    underlay_ipv6: str | None = None
    locator: str | None = None
    underlay_mtu: int = 1500
    storage_port: int = 10809
    memory_total_mib: int = 0
    memory_free_mib: int = 0
    accelerator: Literal["kvm", "tcg", "none"] = "none"
    hypervisor_version: str = ""
    pauses_by: str = GUEST_PAUSE
    machine_types: tuple[str, ...] = ()
    cpu_models: tuple[str, ...] = ()
    blockers: tuple[str, ...] = ()
    ready: bool = False
    connected_ns: int = 0
    dead: bool = False
    answers: bool = False
    drained: bool = False


class Former(Record, frozen=True, kw_only=True):
    """An address that was an interface's own until move `move`, and is still valid (ADR 0028).

    Until `until_ns` (CLOCK_REALTIME at the NVA), and in any case while its VM moves.
    """

    address: str
    until_ns: int
    move: str


class Interface(Record, frozen=True, kw_only=True):
    """One tenant system interface (TSI) as its owner sees it.

    `slot` is its number in its VM for life: from it come its place on the VM's bus and the name of
    its port. None of what is no VM's, and in records from before slots (`numbered`). `change`: it
    is on its way into a VM that is up, or out of it; nothing else happens to that VM meanwhile.
    """

    network: str
    mac: str
    ipv4: str | None = None
    ipv6: str | None = None
    slot: int | None = None
    change: Literal["adding", "removing"] | None = None
    former: tuple[Former, ...] = ()


class Boot(Record, frozen=True, kw_only=True):
    """How a VM starts: from one of its disks (`image` is that one's path), or a kernel with initial
    RAM disk and command line. Paths are those of the host where it runs.
    """

    image: str | None = None
    kernel: str | None = None
    initrd: str | None = None
    append: str = ""


DiskKind = Literal["shared", "moved", "left"]
DiskFormat = Literal["raw", "qcow2"]


class Disk(Record, frozen=True, kw_only=True):
    """One disk of a VM: an image file (or, shared, a block device).

    An absolute `path` is the same on every host; a relative one lies in each host's disk folder.
    `kind` says what becomes of it when the VM moves: both hosts have the same image (`shared`), it
    goes along (`moved`), or it stays and is reached over the network (`left`). `size_bytes`: of the
    image that is made when there is none; 0 when there must be one.

    `at`: the host that has the image, when the VM was moved away from it; empty: the VM's own.
    `since`: the version that the VM got by that move, or by a later one, and under which the image
    is offered to its host. `uri`: where that is; filled in when an NVE is told, and not kept.
    """

    path: str
    kind: DiskKind = "shared"
    format: DiskFormat = "raw"
    size_bytes: int = 0
    at: str = ""
    since: int = 0
    uri: str = ""


class DiskState(Record, frozen=True, kw_only=True):
    """What a host says of a disk as it is there.

    `trouble`: why a VM could not use it there, empty when it could. `inode` tells two images of one
    path apart. `virtual_bytes`: what the guest sees; `allocated_bytes`: what the image takes;
    `free_bytes`: what is left beside it. `depends`: it has a backing file or snapshots inside.
    """

    exists: bool = False
    trouble: str = ""
    device: bool = False
    inode: int = 0
    format: DiskFormat = "raw"
    virtual_bytes: int = 0
    allocated_bytes: int = 0
    free_bytes: int = 0
    depends: bool = False


class Vm(Record, frozen=True, kw_only=True):
    """A virtual machine. `version` is raised by each commit and governs its addresses.

    `owner`: whose certificate may state things of it (R-25); empty: nobody's.
    """

    name: str
    owner: str = ""
    host: str
    state: VmState = "preparing"
    interfaces: tuple[Interface, ...]
    memory_mib: int = 128
    vcpus: int = 1
    boot: Boot = Boot()
    disks: tuple[Disk, ...] = ()
    machine: str = ""
    cpu: str = ""
    version: int = 1
    move: str | None = None
    reason: str | None = None


def numbered(vm: Vm) -> tuple[tuple[int, Interface], ...]:
    """The interfaces of `vm`, each with its slot; without one its place in the order counts."""
    return tuple(
        (place if each.slot is None else each.slot, each)
        for place, each in enumerate(vm.interfaces)
    )


def ports_of(vm: Vm) -> list[str]:
    """The kernel names of the ports of `vm`, in the order of its interfaces."""
    return [port_name(vm.name, slot) for slot, _ in numbered(vm)]


SLOTS = 16
"""So many interfaces a VM can have at a time: places on its bus (hypervisor/command.py)."""

PLUGGABLE = "pc-i440fx-"
"""How the names of machines begin whose bus takes devices while they run: their guest is told by
ACPI. On the other kind that we know, q35, every place would have to be made beforehand (ADR 0029).
"""


def moved_disks(vm: Vm | None) -> tuple[Disk, ...]:
    """The disks that go along when `vm` moves."""
    return tuple(disk for disk in vm.disks if disk.kind == "moved") if vm is not None else ()


def left_at(vm: Vm) -> frozenset[str]:
    """The hosts with images of `vm`, of a move's record: of those that stay where they are."""
    return frozenset(disk.at for disk in vm.disks if disk.kind == "left")


def seen_from(vm: Vm | None, host: str, version: int | None = None) -> Vm:
    """`vm`, of a move's record, as `host` runs it: what lies on that host is reached as a file.

    With `version` the other images are those offered to the host under it: after the commit.
    """
    assert vm is not None

    def seen(disk: Disk) -> Disk:
        if disk.kind != "left" or disk.at == host:
            return msgspec.structs.replace(disk, uri="")
        return msgspec.structs.replace(disk, since=disk.since if version is None else version)

    return msgspec.structs.replace(vm, disks=tuple(seen(disk) for disk in vm.disks))


class Export(Record, frozen=True, kw_only=True):
    """Disk number `index` of `vm` is offered to host `to`, where the VM is since `version`.

    To nobody else, and under no other version: that is the right to write it (R-14).
    """

    vm: str
    index: int
    disk: Disk
    to: str
    version: int


class Endpoint(Record, frozen=True, kw_only=True):
    """A network namespace attached like a VM: a correspondent."""

    name: str
    host: str
    namespace: str
    interface: Interface
    version: int = 1


class Leg(Record, frozen=True, kw_only=True):
    """Where a gateway stands in the physical network: a port of `bridge`, a device of its host.

    Addresses are the gateway's own, with their prefix length; `via` the next routers' there. All
    of a family or nothing.
    """

    bridge: str
    mac: str = ""
    ipv4: str | None = None
    ipv6: str | None = None
    via_ipv4: str | None = None
    via_ipv6: str | None = None

    def families(self) -> tuple[Family, ...]:
        """Those in which there is a way out."""
        each: tuple[tuple[Family, str | None], ...]
        each = (("ipv4", self.via_ipv4), ("ipv6", self.via_ipv6))
        return tuple(family for family, via in each if via)


class Gateway(Record, frozen=True, kw_only=True):
    """One way between routed VN `network` and the physical network, on `host` (R-19).

    `interface` is its place in the VN, where it is mapped like a tenant; `leg` the one outside.
    """

    network: str
    host: str
    interface: Interface
    leg: Leg
    version: int = 1

    @property
    def owner(self) -> str:
        """Who it is in mappings; no VM can have such a name."""
        return f"gateway/{self.host}"

    @property
    def key(self) -> str:
        """A VN has one on each host at most."""
        return f"{self.network}/{self.host}"


class WaysOut(Record, frozen=True, kw_only=True):
    """By which of its gateways each tenant of VN `network` goes out in `family` (6-14).

    Both `among` and `kept` name hosts. A tenant's gateway is its first choice among `among`, unless
    `kept` has another: what it had before these were the gateways, or what an operator gave it.
    """

    network: str
    family: Family
    among: tuple[str, ...]
    kept: dict[str, str] = {}

    @property
    def key(self) -> str:
        """There is one of each family."""
        return f"{self.network}/{self.family}"


class Policy(Record, frozen=True, kw_only=True):
    """Tenants of two routed VNs may talk with each other, both ways; without it none do (N-15).

    `networks` are in the order of their names. `at_ns`: since when, CLOCK_REALTIME at the NVA.
    """

    networks: tuple[str, str]
    at_ns: int

    @property
    def key(self) -> str:
        """There is one of each pair."""
        return ",".join(self.networks)


class Mapping(Record, frozen=True, kw_only=True):
    """(VN, tenant address) to NVE (N-01). `nve` is a host name; its addresses are in `Host`.

    `beside`: addresses that are as valid as `ipv4` and `ipv6`, while a change of address is made.
    """

    network: str
    owner: str
    mac: str
    ipv4: str | None = None
    ipv6: str | None = None
    beside: tuple[str, ...] = ()
    nve: str
    version: int


class Refused(Record, frozen=True, kw_only=True):
    """A `no` with its reason and its remedy. Not an error: the answer to a wish.

    `code` is stable and machine-readable, the same on the command line and in REST.
    """

    code: str
    what: str
    why: str
    hint: str = ""
