"Recommendations over HTTP: validate, ask the bundle, say which model answered."

from typing import Annotated

from fastapi import APIRouter, Body, Query, Request
from fastapi.responses import JSONResponse

from serving.problems import INTERNAL, Problem, documented
from serving.schemas import MAX_BODY, Models, RecommendationRequest, Recommendations, SimilarItems, SimilarQuery
from shopai.recommend.bundle import UnknownItem

router = APIRouter(prefix="/v1", tags=["recommendations"])

_ITEM = {"item_id": "22697", "title": "GREEN REGENCY TEACUP AND SAUCER", "score": 0.41, "rank": 1}
# FastAPI drops nulls from examples, so the example is one where popularity answered; the usual `"fallback": null` is in the field's description.
_ANSWER = {"request_id": "5f0c1f6e9d5b4a0f8e0a3f5b1c2d3e4f", "model_version": "3", "fallback": "unknown_user", "context": "none", "items": [_ITEM]}
_ALWAYS = {**documented(503, "no-model", "no model is ready: the champion is being loaded"), **documented(500, "internal", INTERNAL)}


def _example(value: dict) -> dict:
    return {200: {"content": {"application/json": {"example": value}}}}


# The handlers are coroutines although they only compute: an answer takes about a millisecond, less than handing it to a thread and back costs in the tail.
# They return ready responses: the bundle's answer is already of the documented form (a test holds them together), so it isn't validated a second time.


@router.post("/recommendations", response_model=Recommendations, summary="Recommend items", responses={
    **_example(_ANSWER), **_ALWAYS,
    **documented(400, "invalid-json", "the body is not valid JSON: Expecting value at character 8"),
    **documented(413, "too-large", f"the body must not be longer than {MAX_BODY} bytes"),
    **documented(422, "invalid-request", "k must be a whole number from 1 to 100, got 0"),
})
async def recommendations(request: Request, body: Annotated[RecommendationRequest, Body(openapi_examples={
    "customer": {"summary": "A known customer", "value": {"user_id": "12583", "k": 3}},
    "visitor": {"summary": "A visitor, by the items of the session", "value": {"item_ids": ["22423", "47566"], "k": 3, "exclude": ["85123A"]}},
    "visit": {"summary": "A visitor, by the session that the events tell of", "value": {"session_id": "9c1d6a", "k": 3}},
})]) -> JSONResponse:
    """Items that fit a customer's whole history and the visit under way, or the items a visitor has just looked at.

    What the shop has seen of the visit is looked up, and `context` says whether it was used. What the customer already bought, the items sent, the last items
    of the visit and those in `exclude` are never returned. An unknown customer is no error: popular items answer, and `fallback` says so.
    """
    served = request.app.state.live.require()
    recommender, item_ids = served.recommender, None if body.user_id is not None else body.item_ids or ()
    known = request.app.state.features.context(body.user_id, body.session_id, recommender.histories.now)
    answer = recommender.recommend(body.user_id, item_ids, body.k, [*body.exclude, *known.withheld], known.recent)
    return JSONResponse({"request_id": request.state.request_id, "model_version": recommender.version, "context": known.label, **answer.to_dict()})


@router.get("/items/{item_id:path}/similar", response_model=SimilarItems, summary="Similar items", responses={
    **_example({**{name: _ANSWER[name] for name in ("request_id", "model_version")}, "item_id": "22699", "items": [_ITEM]}), **_ALWAYS,
    **documented(404, "unknown-item", 'unknown item "no-such-item"', "/v1/items/no-such-item/similar"),
    **documented(422, "invalid-request", 'k must be a whole number from 1 to 100, got "0"', "/v1/items/22699/similar"),
})
async def similar(request: Request, item_id: str, query: Annotated[SimilarQuery, Query()]) -> JSONResponse:
    "Items that the same customers buy; none for an item newer than the model. An item id that holds a slash or another odd character is sent percent-encoded."
    served = request.app.state.live.require()
    try:
        items = served.recommender.similar(item_id, query.k)
    except UnknownItem as error:
        raise Problem(404, "unknown-item", str(error)) from None
    body = {"request_id": request.state.request_id, "model_version": served.recommender.version, "item_id": item_id}
    return JSONResponse({**body, "items": [item.to_dict() for item in items]})


@router.get("/models", response_model=Models, summary="Models being served")
async def models(request: Request) -> JSONResponse:
    "The models this process answers with, their measured figures and their promotion; empty while none is loaded."
    served = request.app.state.live.current
    return JSONResponse({"models": [] if served is None else [served.to_dict()]})
