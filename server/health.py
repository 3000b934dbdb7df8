"""Probes, `/version` and `/metrics`: what operators and their machines ask."""

from typing import Literal

from fastapi import APIRouter, Response
from fastapi.responses import RedirectResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from server.responses import HealthResponse, StatusResponse, VersionResponse
from server.services import Services, ServicesDep
from server.version import VERSION

router = APIRouter(tags=["operation"])


@router.get("/health/live", responses={503: {"model": StatusResponse, "description": "The engine has died: restart"}})
async def live(services: ServicesDep, response: Response) -> StatusResponse:
    """Whether the process is worth keeping. A full queue or a shutdown in progress does not make it false."""
    if not services.engine.alive:
        response.status_code = 503
    return {"status": _status(services)}


@router.get("/health/ready", responses={503: {"model": StatusResponse, "description": "Send no new requests"}})
async def ready(services: ServicesDep, response: Response) -> StatusResponse:
    """Whether to send requests here: false from SIGTERM on and when the engine is dead, never because it is busy."""
    status = _status(services)
    if status != "ok":
        response.status_code = 503
    return {"status": status}


@router.get("/health")
async def health(services: ServicesDep) -> HealthResponse:
    """The state of the server and how busy the engine is, for people. Probes use `/health/live` and `/health/ready`."""
    stats = services.engine.stats()
    return {
        "status": _status(services),
        "model": services.model_name,
        "running": stats.running,
        "waiting": stats.waiting,
        "kv_cache_usage": stats.kv_blocks_used / max(1, stats.kv_blocks_total),
    }


def _status(services: Services) -> Literal["ok", "draining", "stopped"]:
    if not services.engine.alive:
        return "stopped"
    return "draining" if services.lifecycle.leaving else "ok"


@router.get("/version")
async def get_version() -> VersionResponse:
    """The server's version."""
    return {"version": VERSION}


@router.get("/metrics", response_class=Response)
def metrics(services: ServicesDep) -> Response:
    """Metrics in Prometheus' text format. (Not a coroutine: writing them takes milliseconds, in a thread.)"""
    return Response(generate_latest(services.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})


@router.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    """People who open the server in a browser want the documentation."""
    return RedirectResponse("docs")
