"Is the process alive, and can it answer?"

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from serving.models import RETRY_AFTER
from serving.problems import Problem, documented
from serving.schemas import Health, Ready

router = APIRouter(tags=["health"])


@router.get("/healthz", response_model=Health, summary="Alive")
async def healthz() -> JSONResponse:
    "200 as long as the process runs. An orchestrator restarts a process that doesn't answer."
    return JSONResponse({"status": "alive"})


@router.get("/readyz", response_model=Ready, summary="Ready", responses=documented(
    503, "not-ready", "no model is ready: model/weights.npz does not match its digest", "/readyz"))
async def readyz(request: Request) -> JSONResponse:
    "200 once the champion is loaded and has answered warm-up requests, else 503 with the reason. A load balancer sends requests to ready processes only."
    live = request.app.state.live
    served = live.current
    if served is None:
        raise Problem(503, "not-ready", f"no model is ready: {live.refused}", {"Retry-After": str(RETRY_AFTER)})
    return JSONResponse({"status": "ready", "model_version": served.recommender.version, "refused": live.refused})
