"""What the routes of one application share."""

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, cast

import torch
from fastapi import Depends, Request

from engine import AsyncEngine, KernelSet
from server.errors import ModelNotFound
from server.lifecycle import Lifecycle
from server.metrics import ServerMetrics
from server.settings import ServerSettings
from server.version import VERSION

if TYPE_CHECKING:
    from server.tracing import RequestTracer  # needs an extra


@dataclass(frozen=True, slots=True)
class Services:
    """The engine and everything around it, made once for an application.

    Attributes:
        model_name: Name of the model in the API.
        fingerprint: Changes with anything that may change the tokens of a seeded request.
        started: Unix time of the start.
        tracer: Traces requests; None if nobody asked for it.
    """

    engine: AsyncEngine
    settings: ServerSettings
    metrics: ServerMetrics
    lifecycle: Lifecycle
    model_name: str
    fingerprint: str
    started: int
    tracer: "RequestTracer | None" = None

    @classmethod
    def create(cls, engine: AsyncEngine, settings: ServerSettings, tracer: "RequestTracer | None" = None) -> "Services":
        """Services around a loaded engine."""
        name = settings.served_model_name or engine.info.name
        metrics, fingerprint = ServerMetrics(engine), _fingerprint(engine)
        return cls(engine, settings, metrics, Lifecycle(), name, fingerprint, int(time.time()), tracer)

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model; None asks for no one in particular.

        Raises:
            ModelNotFound: It is not the served one.
        """
        if name is not None and name != self.model_name:
            raise ModelNotFound(name, self.model_name)


def _fingerprint(engine: AsyncEngine) -> str:
    """A name for all that the tokens of a seeded request may depend on.

    Our kernels give the same bits on any number of threads and with zeros skipped or not; PyTorch's may not.
    """
    info, config = engine.info, engine.config
    reference = (info.threads,) if config.kernels is KernelSet.REFERENCE else ()
    facts = (
        VERSION,
        torch.__version__,
        info.architecture,
        info.weights_digest,  # of the quantisation, too
        info.dtype,
        info.device,
        info.kernels["linear"],
        info.kernels["attention"],
        *reference,
    )
    return "fp_" + hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


async def get_services(request: Request) -> Services:
    """The application's services, as a dependency. (A coroutine: FastAPI runs plain functions in its thread pool.)"""
    return cast(Services, request.app.state.services)


ServicesDep = Annotated[Services, Depends(get_services)]
