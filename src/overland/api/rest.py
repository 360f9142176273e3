"""REST for people and scripts: /v1, OpenAPI at /docs, errors as RFC 9457 problems.

Turns wishes into calls on a Service and its answers into JSON; decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Literal, Protocol

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from overland.model.cluster import (
    Boot,
    Disk,
    Endpoint,
    Export,
    Gateway,
    Host,
    Interface,
    Leg,
    Network,
    Policy,
    Record,
    Refused,
    Vm,
)
from overland.model.eligibility import LatencyClass, Signed
from overland.model.forecast import Forecast
from overland.model.handover import Handover, Options
from overland.model.receipt import receipt, timestamp
from overland.nva import storage
from overland.nva.authority import Authority, Blocked
from overland.ports import StoreFailure

_STATUS = {
    "malformed": 422,
    "exists": 409,
    "vni_taken": 409,
    "address_taken": 409,
    "failed": 502,
    "store": 507,
}


class Service(Protocol):
    """What the API needs of the NVA."""

    authority: Authority

    async def create_gateway(self, wish: GatewayWish) -> Gateway: ...

    async def delete_gateway(self, network: str, host: str) -> None: ...

    async def allow(self, one: str, other: str) -> tuple[Policy, list[str]]: ...

    async def deny(self, one: str, other: str) -> tuple[Policy, list[str]]: ...

    async def state(self, name: str, signed: Signed) -> None: ...

    async def create_vm(self, wish: Vm) -> Vm: ...

    async def vm_action(self, name: str, action: str) -> Vm: ...

    async def delete_vm(self, name: str) -> None: ...

    async def change_addresses(
        self, name: str, network: str, changes: dict[str, str | None]
    ) -> Vm: ...

    async def add_interface(self, name: str, wish: Interface) -> Vm: ...

    async def remove_interface(self, name: str, which: str) -> Vm: ...

    async def cold_blockers(self, name: str, to: str, options: Options) -> tuple[Refused, ...]: ...

    async def forecast(
        self, name: str, to: str, options: Options
    ) -> tuple[Forecast | None, tuple[Refused, ...]]: ...

    async def migrate(self, name: str, to: str, options: Options, *, cold: bool = False) -> str: ...

    async def disk_blockers(
        self, name: str, path: str, to: str
    ) -> tuple[Vm, tuple[Refused, ...]]: ...

    async def move_disk(self, name: str, path: str, to: str, options: Options) -> str: ...

    async def recover(self, name: str, *, fenced: bool) -> dict[str, Any]: ...

    def find_move(self, move_id: str) -> Handover | None: ...

    def abort(self, move_id: str) -> bool: ...

    async def repair(self, move_id: str | None) -> list[dict[str, str]]: ...

    def follow(self, move_id: str) -> AsyncIterator[dict[str, Any]]: ...


class GatewayWish(Record, frozen=True, kw_only=True):
    """Body of POST /v1/gateways. The rest is chosen."""

    network: str
    host: str
    leg: Leg


class AssignWish(Record, frozen=True, kw_only=True):
    """Body of POST /v1/gateways/NETWORK/HOST/tenants: these go out by that gateway."""

    tenants: tuple[str, ...]


class PolicyWish(Record, frozen=True, kw_only=True):
    """Body of POST /v1/policies: tenants of these two may talk."""

    networks: tuple[str, str]


class InterfaceWish(Record, frozen=True, kw_only=True):
    """Body of POST /v1/vms/NAME/interfaces, and a part of VmWish. What is left out is chosen.

    As it is wished, or as a dry run has answered: what else that says is left.
    """

    network: str | None = None
    mac: str | None = None
    ipv4: str | None = None
    ipv6: str | None = None

    def as_wished(self) -> Interface:
        """The interface as far as it is wished."""
        mac = self.mac or ""
        return Interface(network=self.network or "", mac=mac, ipv4=self.ipv4, ipv6=self.ipv6)


class VmWish(Record, frozen=True, kw_only=True):
    """Body of POST /v1/vms. Addresses left out are chosen; `dry_run` shows them, no more."""

    name: str
    owner: str = ""
    host: str
    interfaces: tuple[InterfaceWish, ...]
    memory_mib: int = 128
    vcpus: int = 1
    boot: Boot = Boot()
    disks: tuple[Disk, ...] = ()
    dry_run: bool = False


class AddressWish(Record, frozen=True, kw_only=True):
    """Body of PATCH /v1/vms/NAME/interfaces/NETWORK. What is left out stays, null takes away."""

    ipv4: str | msgspec.UnsetType | None = msgspec.UNSET
    ipv6: str | msgspec.UnsetType | None = msgspec.UNSET


class DeclareWish(Record, frozen=True, kw_only=True):
    """Body of PATCH /v1/vms/NAME/eligibility: what the operator knows. What is left out stays."""

    outside: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    uncovered: Literal["refuse", "flag"] | msgspec.UnsetType = msgspec.UNSET
    latency: LatencyClass | msgspec.UnsetType = msgspec.UNSET


OPERATOR = "operator"
"""Who speaks to the API: it asks nobody who he is."""


class MigrateWish(Record, frozen=True, kw_only=True):
    """Body of POST /v1/vms/NAME/migrate."""

    to: str
    mode: str = "hot"
    dry_run: bool = False
    options: Options = Options()


class DiskMoveWish(Record, frozen=True, kw_only=True):
    """Body of POST /v1/vms/NAME/disks/move. `to`: the VM's own host."""

    disk: str
    to: str
    dry_run: bool = False
    options: Options = Options()


CHECKPOINTS = 3
"""Of a warm move that does not say how many."""


class RecoverWish(Record, frozen=True, kw_only=True):
    """Body of POST /v1/vms/NAME/recover. `fenced`: the operator knows that the old host is off."""

    fenced: bool = False


class DrainWish(Record, frozen=True, kw_only=True):
    """Body of POST /v1/hosts/NAME/drain. The moves themselves are wishes of their own."""

    dry_run: bool = False


def problem(refusals: tuple[Refused, ...]) -> JSONResponse:
    """RFC 9457; the first refusal leads, `blockers` lists all."""
    first = refusals[0]
    unknown = 404 if first.code.startswith("unknown") else 409
    body = {
        "type": f"urn:overland:{first.code}",
        "title": first.what,
        "detail": first.why,
        "code": first.code,
        "hint": first.hint,
        "blockers": [msgspec.to_builtins(each) for each in refusals],
    }
    status = _STATUS.get(first.code, unknown)
    return JSONResponse(body, status, media_type="application/problem+json")


async def _body(request: Request, kind: Any) -> Any:
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except msgspec.DecodeError as error:
        raise Blocked([Refused(code="malformed", what="request", why=str(error))]) from None


def _json(value: Any, status: int = 200) -> JSONResponse:
    return JSONResponse(msgspec.to_builtins(value), status)


def create_app(service: Service) -> FastAPI:
    """The whole API over `service`."""
    app = FastAPI(title="overland NVA", version="1")

    @app.exception_handler(Blocked)
    async def _blocked(_: Request, error: Blocked) -> JSONResponse:
        return problem(error.refusals)

    @app.exception_handler(StoreFailure)
    async def _store(_: Request, error: StoreFailure) -> JSONResponse:
        return problem((Refused(code="store", what="store", why=str(error)),))

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    _records(app, service)
    _gateways(app, service)
    _policies(app, service)
    _eligibility(app, service)
    _interfaces(app, service)
    _machines(app, service)
    _disks(app, service)
    _moves(app, service)
    return app


def _records(app: FastAPI, service: Service) -> None:
    authority = service.authority

    @app.get("/v1/networks")
    async def networks() -> JSONResponse:
        return _json(sorted(authority.cluster.networks.values(), key=lambda each: each.name))

    @app.post("/v1/networks", status_code=201)
    async def create_network(request: Request) -> JSONResponse:
        return _json(await authority.create_network(await _body(request, Network)), 201)

    @app.delete("/v1/networks/{name}", status_code=204)
    async def delete_network(name: str) -> Response:
        await authority.delete_network(name)
        return Response(status_code=204)

    @app.get("/v1/hosts")
    async def hosts() -> JSONResponse:
        cluster = authority.cluster
        every = sorted(cluster.hosts.values(), key=lambda each: each.name)
        return _json([_host(each, storage.exports(cluster, each.name)) for each in every])

    @app.post("/v1/hosts/{name}/drain")
    async def drain(name: str, request: Request) -> JSONResponse:
        wish = await _body(request, DrainWish)
        plan = authority.drain_plan(name)
        if not wish.dry_run:
            await authority.drain(name, drained=True)
        return _json(plan)

    @app.post("/v1/hosts/{name}/undrain", status_code=204)
    async def undrain(name: str) -> Response:
        await authority.drain(name, drained=False)
        return Response(status_code=204)

    @app.get("/v1/endpoints")
    async def endpoints() -> JSONResponse:
        return _json(sorted(authority.cluster.endpoints.values(), key=lambda each: each.name))

    @app.post("/v1/endpoints", status_code=201)
    async def create_endpoint(request: Request) -> JSONResponse:
        return _json(await authority.create_endpoint(await _body(request, Endpoint)), 201)

    @app.delete("/v1/endpoints/{name}", status_code=204)
    async def delete_endpoint(name: str) -> Response:
        await authority.delete_endpoint(name)
        return Response(status_code=204)


def _host(host: Host, exports: tuple[Export, ...]) -> dict[str, Any]:
    """With the images on it that VMs on other hosts use."""
    offered = [
        {"vm": each.vm, "disk": each.disk.path, "to": each.to, "version": each.version}
        for each in exports
    ]
    return {**msgspec.to_builtins(host), "exports": offered}


def _gateways(app: FastAPI, service: Service) -> None:
    authority = service.authority

    @app.get("/v1/gateways")
    async def gateways() -> JSONResponse:
        return _json(sorted(authority.cluster.gateways.values(), key=lambda each: each.key))

    @app.post("/v1/gateways", status_code=201)
    async def create_gateway(request: Request) -> JSONResponse:
        return _json(await service.create_gateway(await _body(request, GatewayWish)), 201)

    @app.delete("/v1/gateways/{network}/{host}", status_code=204)
    async def delete_gateway(network: str, host: str) -> Response:
        await service.delete_gateway(network, host)
        return Response(status_code=204)

    @app.get("/v1/gateways/{network}/tenants")
    async def tenants(network: str) -> JSONResponse:
        return _json(authority.gateway_tenants(network))

    @app.post("/v1/gateways/{network}/spread")
    async def spread(network: str) -> JSONResponse:
        await authority.spread_gateways(network)
        return _json(authority.gateway_tenants(network))

    @app.post("/v1/gateways/{network}/{host}/tenants")
    async def assign(network: str, host: str, request: Request) -> JSONResponse:
        wish = await _body(request, AssignWish)
        await authority.assign_gateway(network, host, wish.tenants)
        return _json(authority.gateway_tenants(network))


def _policies(app: FastAPI, service: Service) -> None:
    """`waiting`: hosts that did not have it in their kernels when the answer was given."""
    authority = service.authority

    def answer(policy: Policy, waiting: list[str], *, allowed: bool) -> JSONResponse:
        return _json({"networks": policy.networks, "allowed": allowed, "waiting": waiting})

    @app.get("/v1/policies")
    async def policies() -> JSONResponse:
        every = sorted(authority.cluster.policies.values(), key=lambda each: each.networks)
        return _json([{"networks": p.networks, "since": timestamp(p.at_ns)} for p in every])

    @app.post("/v1/policies")
    async def allow(request: Request) -> JSONResponse:
        wish = await _body(request, PolicyWish)
        return answer(*await service.allow(*wish.networks), allowed=True)

    @app.delete("/v1/policies/{one}/{other}")
    async def deny(one: str, other: str) -> JSONResponse:
        return answer(*await service.deny(one, other), allowed=False)


def _eligibility(app: FastAPI, service: Service) -> None:
    """Before the VMs' own actions: it has paths below them."""
    authority = service.authority

    @app.get("/v1/vms/{name}/eligibility")
    async def eligibility(name: str) -> JSONResponse:
        return _json(authority.eligibility(name))

    @app.patch("/v1/vms/{name}/eligibility")
    async def declare(name: str, request: Request) -> JSONResponse:
        wish = msgspec.to_builtins(await _body(request, DeclareWish))
        await authority.declare(name, OPERATOR, **wish)
        return _json(authority.eligibility(name))

    @app.post("/v1/vms/{name}/registration")
    async def register(name: str, request: Request) -> JSONResponse:
        await service.state(name, await _body(request, Signed))
        return _json(authority.eligibility(name))

    @app.delete("/v1/vms/{name}/registration")
    async def revoke(name: str) -> JSONResponse:
        await authority.revoke(name, OPERATOR)
        return _json(authority.eligibility(name))


def _interfaces(app: FastAPI, service: Service) -> None:
    """Before the VMs' own actions: it has paths below them."""

    @app.post("/v1/vms/{name}/interfaces", status_code=201)
    async def add_interface(name: str, request: Request) -> JSONResponse:
        wish = await _body(request, InterfaceWish)
        return _json(storage.shown(await service.add_interface(name, wish.as_wished())), 201)

    @app.delete("/v1/vms/{name}/interfaces/{which}")
    async def remove_interface(name: str, which: str) -> JSONResponse:
        return _json(storage.shown(await service.remove_interface(name, which)))

    @app.patch("/v1/vms/{name}/interfaces/{network}")
    async def change_addresses(name: str, network: str, request: Request) -> JSONResponse:
        wish = msgspec.to_builtins(await _body(request, AddressWish))
        return _json(storage.shown(await service.change_addresses(name, network, wish)))


def _machines(app: FastAPI, service: Service) -> None:
    authority = service.authority

    @app.get("/v1/vms")
    async def vms() -> JSONResponse:
        every = sorted(authority.cluster.vms.values(), key=lambda each: each.name)
        return _json([storage.shown(each) for each in every])

    @app.get("/v1/vms/{name}")
    async def vm(name: str) -> JSONResponse:
        return _json(storage.shown(authority.vm(name)))

    @app.post("/v1/vms", status_code=201)
    async def create_vm(request: Request) -> JSONResponse:
        wish = await _body(request, VmWish)
        made = Vm(
            name=wish.name,
            owner=wish.owner,
            host=wish.host,
            interfaces=tuple(each.as_wished() for each in wish.interfaces),
            memory_mib=wish.memory_mib,
            vcpus=wish.vcpus,
            boot=wish.boot,
            disks=tuple(msgspec.structs.replace(disk, at="", since=0) for disk in wish.disks),
        )
        if wish.dry_run:
            return _json(storage.shown(authority.completed(made)))
        return _json(storage.shown(await service.create_vm(made)), 201)

    @app.post("/v1/vms/{name}/{action}")
    async def act(name: str, action: str, request: Request) -> JSONResponse:
        if action == "migrate":
            return await _migrate(service, name, await _body(request, MigrateWish))
        if action == "recover":
            fenced = (await _body(request, RecoverWish)).fenced
            return _json(await service.recover(name, fenced=fenced))
        if action not in ("start", "pause", "resume", "suspend", "stop"):
            why = f"there is no action {action}"
            raise Blocked([Refused(code="unknown_action", what=f"vm {name}", why=why)])
        return _json(storage.shown(await service.vm_action(name, action)))

    @app.delete("/v1/vms/{name}", status_code=204)
    async def delete_vm(name: str) -> Response:
        await service.delete_vm(name)
        return Response(status_code=204)


def _disks(app: FastAPI, service: Service) -> None:
    @app.post("/v1/vms/{name}/disks/move")
    async def move_disk(name: str, request: Request) -> JSONResponse:
        wish = await _body(request, DiskMoveWish)
        if wish.dry_run:
            _, blockers = await service.disk_blockers(name, wish.disk, wish.to)
            return _json({"vm": name, "disk": wish.disk, "to": wish.to, "blockers": blockers})
        move = await service.move_disk(name, wish.disk, wish.to, wish.options)
        return _json({"id": move}, 202)


async def _migrate(service: Service, name: str, wish: MigrateWish) -> JSONResponse:
    if wish.mode not in ("hot", "warm", "cold"):
        why = f"mode {wish.mode} is not built yet"
        raise Blocked([Refused(code="unsupported_mode", what=f"vm {name}", why=why, hint="--hot")])
    cold = wish.mode == "cold"
    many = (wish.options.checkpoints or CHECKPOINTS) if wish.mode == "warm" else 0
    options = msgspec.structs.replace(wish.options, checkpoints=many)
    if not wish.dry_run:
        return _json({"id": await service.migrate(name, wish.to, options, cold=cold)}, 202)
    forecast: Forecast | None = None
    if cold:
        blockers = await service.cold_blockers(name, wish.to, options)
    else:
        forecast, blockers = await service.forecast(name, wish.to, options)
    flags = () if blockers else service.authority.flags(name, wish.to, options)
    return _json(
        {"vm": name, "to": wish.to, "blockers": blockers, "flags": flags, "forecast": forecast}
    )


def _moves(app: FastAPI, service: Service) -> None:
    authority = service.authority

    def found(move_id: str) -> Handover:
        record = service.find_move(move_id)
        if record is None:
            why = "there is no such migration"
            what = f"migration {move_id}"
            raise Blocked([Refused(code="unknown_migration", what=what, why=why)])
        return record

    @app.get("/v1/migrations")
    async def migrations() -> JSONResponse:
        every = [*authority.ended_moves.values(), *authority.cluster.moves.values()]
        every.sort(key=lambda each: each.phases[0].at_ns)
        return _json([receipt(each) for each in every])

    @app.get("/v1/migrations/{move_id}")
    async def migration(move_id: str) -> JSONResponse:
        return _json(receipt(found(move_id)))

    @app.get("/v1/migrations/{move_id}/events")
    async def events(move_id: str) -> StreamingResponse:
        found(move_id)

        async def lines() -> AsyncIterator[str]:
            async for state in service.follow(move_id):
                yield f"data: {json.dumps(state)}\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    @app.post("/v1/migrations/repair")
    async def repair_all() -> JSONResponse:
        return _json(await service.repair(None))

    @app.post("/v1/migrations/{move_id}/repair")
    async def repair(move_id: str) -> JSONResponse:
        found(move_id)
        return _json(await service.repair(move_id))

    @app.post("/v1/migrations/{move_id}/abort")
    async def abort(move_id: str) -> JSONResponse:
        record = found(move_id)
        if not service.abort(move_id):
            why = f"it has ended: {record.outcome}"
            raise Blocked([Refused(code="ended", what=f"migration {move_id}", why=why)])
        return _json({"id": move_id}, 202)
