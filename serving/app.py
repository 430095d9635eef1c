"The application: `create_app` puts the services together. `uvicorn --factory serving.app:create_app` runs it; so does `shopai serve`."

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import to_thread
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from serving.config import get_serve_settings
from serving.features import LiveFeatures
from serving.logs import configure
from serving.middleware import CrossOrigin, RequestContext
from serving.models import LiveModel
from serving.problems import install
from serving.services import events, health, recommend
from shopai import __version__
from shopai.core.artifacts import ModelStore
from shopai.core.config import Settings, get_settings

DESCRIPTION = """
What a shop asks while a customer waits, and what it tells.

* **Recommendations** for a known customer or for a visitor's session, by what the shop knows now: `POST /v1/recommendations`.
* **Similar items** for a product page: `GET /v1/items/{item_id}/similar`.
* **Events**, what visitors do: `POST /v1/events`, safe on disk when it answers. `/v1/shopai.js` sends them from the shop's pages, once a visitor consents.
* **Which model answers**, how it was judged and when it was promoted: `GET /v1/models`.

Each answer names its `model_version` and its `request_id` (send `X-Request-ID` to choose it), and says in `fallback` when something simpler than the model had
to answer, and in `context` whether the visit under way was known.
Each error is a problem document (RFC 9457, `application/problem+json`) whose `detail` says in one line what to change.

The page at `/docs` fetches its scripts from the internet; where there is none, `/openapi.json` says the same.
"""
LINKS = {
    "recommendations": "/v1/recommendations",
    "similar_items": "/v1/items/{item_id}/similar",
    "models": "/v1/models",
    "events": "/v1/events",
    "script": "/v1/shopai.js",
    "alive": "/healthz",
    "ready": "/readyz",
    "openapi": "/openapi.json",
    "documentation": "/docs",
}


def create_app(settings: Settings | None = None) -> FastAPI:
    "The API over the model store of `settings`; without them, of the environment."
    settings, serve = settings or get_settings(), get_serve_settings()
    configure(serve.log_level)
    live = LiveModel(ModelStore(settings.store_location), serve.model, settings.home.absolute() / "cache" / "models", serve.poll_seconds)
    features = LiveFeatures.from_settings(settings, serve.feature_timeout_ms)
    intake = events.Intake(settings)  # takes events whether or not there is a model

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        live.start()
        features.start()
        yield
        live.stop()
        await to_thread.run_sync(features.stop)
        await to_thread.run_sync(intake.close)

    app = FastAPI(title="shopai", version=__version__, description=DESCRIPTION, lifespan=lifespan, redirect_slashes=False)
    app.state.live, app.state.features, app.state.intake, app.state.serve = live, features, intake, serve
    install(app)
    app.add_middleware(RequestContext)
    app.add_middleware(CrossOrigin, path="/v1/events", origins=serve.allowed_origins)
    app.include_router(recommend.router)
    app.include_router(events.router)
    app.include_router(health.router)

    @app.get("/", include_in_schema=False)
    async def root() -> JSONResponse:
        return JSONResponse({"name": "shopai", "version": __version__, "links": LINKS})

    return app
