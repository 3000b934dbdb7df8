"""`/v1/models`: the one model that is served."""

from fastapi import APIRouter

from server.documentation import ERRORS
from server.responses import ModelCard, ModelList
from server.services import Services, ServicesDep

router = APIRouter(tags=["model"])


@router.get("/v1/models")
async def list_models(services: ServicesDep) -> ModelList:
    """The served model."""
    return {"object": "list", "data": [_card(services)]}


@router.get("/v1/models/{model:path}", responses={404: ERRORS[404], "default": ERRORS["default"]})
async def get_model(model: str, services: ServicesDep) -> ModelCard:
    """A model by its name, which may hold slashes."""
    services.check_model(model)
    return _card(services)


def _card(services: Services) -> ModelCard:
    info = services.engine.info
    return {
        "id": services.model_name,
        "object": "model",
        "created": services.started,
        "owned_by": "siluette",
        "max_model_len": info.max_model_len,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "weight_bytes": info.weight_bytes,
        "activations": {
            "modes": list(info.support.modes),
            "min_p": info.support.min_p,
            "max_p": info.support.max_p,
            "tuned": info.support.tuned,
            "sparsity": info.quality.mean_sparsity,
        },
    }
