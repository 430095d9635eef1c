"What goes over the wire. The rules stand here once: pydantic enforces them, and the API's documentation and its problem documents quote them."

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_K, MAX_ITEMS, MAX_EXCLUDE, MAX_TEXT = 100, 200, 1000, 128
MAX_BODY = 2_000_000  # bytes; the longest legal request, all of it escaped, stays below
MAX_EVENTS = 500

A_TEXT = f"a text of 1 to {MAX_TEXT} characters"
RULES = {
    "user_id": A_TEXT,
    "session_id": A_TEXT,
    "item_ids": f"a list of 1 to {MAX_ITEMS} item ids, each {A_TEXT}",
    "k": f"a whole number from 1 to {MAX_K}",
    "exclude": f"a list of at most {MAX_EXCLUDE} item ids, each {A_TEXT}",
}
EVENTS = f"a list of 1 to {MAX_EVENTS} events"

Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT)]


class RecommendationRequest(BaseModel):
    "Who is asking: a customer, or a visitor by the session or its items."

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"user_id": "12583", "k": 3}, {"item_ids": ["22423", "47566"], "k": 3, "exclude": ["85123A"]},
                                        {"session_id": "9c1d6a", "k": 3}]},
    )

    user_id: Id | None = Field(None, description=f"A customer's pseudonym, {A_TEXT}. Not together with `item_ids`.")
    item_ids: list[Id] | None = Field(
        None, min_length=1, max_length=MAX_ITEMS, description=f"Recent items of a visitor, oldest first: {RULES['item_ids']}. Not together with `user_id`."
    )
    session_id: Id | None = Field(
        None, description=f"The visit, as its events name it, {A_TEXT}. Alone, or beside `user_id` or `item_ids`: what the shop saw in this visit is used, too."
    )
    k: int = Field(10, ge=1, le=MAX_K, strict=True, description=f"How many items to return: {RULES['k']}.")
    exclude: list[Id] = Field(
        default_factory=list, max_length=MAX_EXCLUDE, description=f"Items never to return, such as those in the basket: {RULES['exclude']}."
    )

    @model_validator(mode="after")
    def _who(self) -> "RecommendationRequest":
        if self.user_id is not None and self.item_ids is not None: raise ValueError("give user_id or item_ids, not both")
        if self.user_id is None and self.item_ids is None and self.session_id is None: raise ValueError("give user_id, item_ids or session_id")
        return self


class SimilarQuery(BaseModel):
    "Parameters of the similar-items address."

    model_config = ConfigDict(extra="forbid")

    k: int = Field(10, ge=1, le=MAX_K, description=f"How many items to return: {RULES['k']}.")


KNOWN = {"body": list(RecommendationRequest.model_fields), "query": list(SimilarQuery.model_fields)}


class Item(BaseModel):
    "One recommended item."

    item_id: str
    title: str | None = Field(description="Name for people; null where the shop's data has none.")
    score: float = Field(description="The model's score. It orders the items of one answer and is no probability.")
    rank: int = Field(description="1 is the best.")


class Recommendations(BaseModel):
    "The answer to a request for recommendations."

    request_id: str = Field(description="The request's `X-Request-ID`, or one made here.")
    model_version: str
    fallback: str | None = Field(
        description="Null when the model answered. Else the reason why popularity did: `unknown_user` (no such customer) or `unknown_items` "
        "(the model knows none of the items)."
    )
    context: Literal["live", "none", "stale", "unavailable", "off"] = Field(
        description="What the shop knows now, beyond the model's data. `live`: recent items of the customer or visit were used. `none`: nothing is known, or "
        "nothing recent. `stale`: what is known is too old to be used. `unavailable`: the feature store could not be asked. `off`: there is no feature store."
    )
    items: list[Item] = Field(description="Best first; fewer than `k` when the catalogue has no more to offer.")


class SimilarItems(BaseModel):
    "The answer to a request for similar items."

    request_id: str
    model_version: str
    item_id: str
    items: list[Item] = Field(description="Best first; fewer than `k` when no more are alike.")


class EventsRequest(BaseModel):
    "What a shop's pages or servers send. It documents the form; the events are read one by one (`shopai.events.wire`), so that a wrong one harms no other."

    model_config = ConfigDict(extra="forbid")

    events: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_EVENTS, description=f"What happened, in any order: {EVENTS}, each a JSON object.")
    sent_at: str | None = Field(None, description="The sender's clock when it sent, with its offset. If it is off by more than a minute, the events' times are "
                                "corrected by the difference.")


class AcceptedEvent(BaseModel):
    "An event that is safe on disk."

    status: Literal["accepted"]
    event_id: str = Field(description="The event's own, or the one it was given.")
    notes: list[str] | None = Field(None, description="What was changed or dropped on the way in; missing when nothing was.")


class RefusedEvent(BaseModel):
    "An event that was not taken."

    status: Literal["refused"]
    reason: str = Field(description="One line: the field, the rule, and what came.")


class EventsAccepted(BaseModel):
    "The answer to events of which at least one was taken."

    request_id: str
    accepted: int
    refused: int
    events: list[AcceptedEvent | RefusedEvent] = Field(description="A verdict for each event, in the order sent.")


class ServedModel(BaseModel):
    "A model that this process answers with."

    name: str
    version: str
    kind: str
    created: str
    promoted_at: str | None
    data_until: str | None = Field(description="End of the data behind the customers' histories.")
    metrics: dict[str, Any]


class Models(BaseModel):
    models: list[ServedModel]


class Health(BaseModel):
    status: str


class Ready(BaseModel):
    status: str
    model_version: str
    refused: str | None = Field(description="Why a newer champion was refused, while this one goes on serving; null when all is well.")


class ProblemDocument(BaseModel):
    "An error, as RFC 9457 describes it."

    type: str = Field(description="Identifies the kind of problem.")
    title: str
    status: int
    detail: str = Field(description="One line that says what to change.")
    instance: str = Field(description="The path that was asked for.")
    request_id: str
    errors: list[dict[str, str]] | None = Field(None, description="For an invalid request: each field's `pointer` and `detail`.")
