"""Routes of models, LoRAs, plans, and what this server can do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from ..presets import PRESETS
from .refused import Refused
from .schema import capabilities
from .studio import Studio
from .videos import BODY, json_object

MOST_PLANS = 24


def model_routes(studio: Studio) -> APIRouter:
    """Everything under /v1/models, /v1/loras, /v1/plan, /v1/capabilities and /v1/images."""
    routes = APIRouter(tags=["models"])

    async def able() -> dict[str, Any]:
        return {**capabilities(), **await studio.facts()}

    for path in ("/v1/capabilities", "/v1/videos/capabilities"):
        routes.get(path, summary="What can be asked for here: options, sources, limits")(able)

    @routes.get("/v1/models", summary="The models: what they make, whether they are here, whether they fit")
    async def models() -> dict[str, Any]:
        return {"object": "list", "default": studio.default_model, "data": await studio.models()}

    def asked(body: bytes) -> str:
        model = json_object(body).get("model")
        if model not in PRESETS:
            raise Refused(400, f"model is {str(model)[:100]!r}, expected one of {', '.join(PRESETS)}", "unknown_model",
                          "model")  # fmt: skip
        return model

    @routes.post("/v1/models/download", status_code=202, summary="Fetch a model, or go on with it")
    async def download(request: Request) -> JSONResponse:
        return JSONResponse(await studio.download(asked(await request.body())), 202)

    @routes.post("/v1/models/size", summary="What a model's download has in bytes; the hub is asked")
    async def size(request: Request) -> dict[str, Any]:
        return await studio.catalog.download_size(asked(await request.body()))

    @routes.post("/v1/models/pause", summary="Pause a download; what has arrived is kept")
    async def pause(request: Request) -> dict[str, Any]:
        return await studio.pause_download(asked(await request.body()))

    @routes.get("/v1/loras", summary="The LoRAs in the folders of WAN_MLX_MODELS")
    async def loras() -> dict[str, Any]:
        return {"object": "list", "data": studio.loras()}

    @routes.post("/v1/plan", summary="What a video would need in memory and time", openapi_extra=BODY)
    async def plan(request: Request) -> dict[str, Any]:
        fields = json_object(await request.body())
        if "requests" not in fields:
            return await studio.plan(fields)
        several = fields["requests"]
        if not isinstance(several, list) or not 1 <= len(several) <= MOST_PLANS or len(fields) > 1:
            raise Refused(400, f"requests is no list of 1 to {MOST_PLANS} requests", param="requests")
        return {"object": "list", "data": await studio.plans(several)}

    @routes.post("/v1/images/generations", summary="Make pictures, and wait for them", openapi_extra=BODY)
    async def images(request: Request) -> dict[str, Any]:
        return await studio.images(json_object(await request.body()))

    return routes
