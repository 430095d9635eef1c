"The API by its contract: answers, problem documents, documentation. Real processes stand in test_serving_faults.py."

import json
import re
import string
import subprocess
import sys
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from shop_server import ASK, ROOT

from serving.app import create_app
from serving.config import get_serve_settings
from serving.problems import MEDIA_TYPE
from serving.schemas import MAX_BODY, Models, ProblemDocument, Ready, RecommendationRequest, Recommendations, SimilarItems
from shopai.core.config import Settings, UsageError


@pytest.fixture(scope="module")
def client(shop):
    app = create_app(Settings(home=shop[0]))
    with TestClient(app, raise_server_exceptions=False) as client:
        app.state.live.refresh()  # don't wait for the thread
        yield client


def problem(answer, status: int, kind: str) -> str:
    "Check that an answer is a problem document of this kind; returns its detail."
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == MEDIA_TYPE
    document = ProblemDocument.model_validate(answer.json(), strict=True, extra="forbid")
    assert (document.type, document.status) == (f"urn:shopai:problem:{kind}", status)
    assert document.request_id == answer.headers["x-request-id"]
    assert "\n" not in document.detail and "Traceback" not in answer.text
    return document.detail


def checked(answer, schema):
    "The body of a 200, held against its documented form: every field, no other."
    assert answer.status_code == 200, answer.text
    schema.model_validate(answer.json(), strict=True, extra="forbid")
    return answer.json()


# --- answers ---


def test_http_gives_what_the_package_gives(client, shop):
    "Parity for every customer, one whom nobody knows, and sessions."
    _, bought, recommender = shop
    asked = [{"user_id": user} for user in [*bought.user_ids.tolist(), "nobody"]]
    asked += [{"item_ids": bought.item_ids[i : i + 3].tolist(), "k": 7, "exclude": bought.item_ids[:2].tolist()} for i in range(10)] + [{"item_ids": ["x"]}]
    for body in asked:
        answer = checked(client.post(ASK, json=body), Recommendations)
        assert answer["model_version"] == "1"
        assert {name: answer[name] for name in ("fallback", "items")} == recommender.recommend(**body).to_dict()


def test_fallbacks_are_labelled(client, shop):
    user = str(shop[1].user_ids[0])
    assert client.post(ASK, json={"user_id": user}).json()["fallback"] is None
    assert client.post(ASK, json={"user_id": "nobody"}).json()["fallback"] == "unknown_user"
    assert client.post(ASK, json={"item_ids": ["no-such-item"]}).json()["fallback"] == "unknown_items"
    assert len(client.post(ASK, json={"user_id": "nobody"}).json()["items"]) == 10


def test_similar_items(client, shop):
    _, bought, recommender = shop
    item = str(bought.item_ids[3])
    answer = checked(client.get(f"/v1/items/{item}/similar", params={"k": 4}), SimilarItems)
    assert answer["items"] == [found.to_dict() for found in recommender.similar(item, 4)]
    assert len(answer["items"]) == 4
    assert "no-such-item" in problem(client.get("/v1/items/no-such-item/similar"), 404, "unknown-item")


def test_models_tells_what_is_served(client):
    (model,) = checked(client.get("/v1/models"), Models)["models"]
    assert (model["name"], model["version"], model["kind"], model["metrics"]) == ("recommend", "1", "ease", {"ndcg@10": 0.25})
    assert model["promoted_at"] and model["created"] and model["data_until"]


def test_health(client):
    assert client.get("/healthz").json() == {"status": "alive"}
    assert checked(client.get("/readyz"), Ready) == {"status": "ready", "model_version": "1", "refused": None}


def test_the_root_lists_addresses_that_exist(client):
    links = client.get("/").json()["links"]
    for name in ("models", "script", "alive", "ready", "openapi", "documentation"): assert client.get(links[name]).status_code == 200


# --- problems ---


@pytest.mark.parametrize(("body", "detail"), [
    ({"user_id": "a", "k": 0}, "k must be a whole number from 1 to 100, got 0"),
    ({"user_id": "a", "k": 101}, "k must be a whole number from 1 to 100, got 101"),
    ({"user_id": "a", "k": "ten"}, 'k must be a whole number from 1 to 100, got "ten"'),
    ({"user_id": "a", "k": 2.5}, "k must be a whole number from 1 to 100, got 2.5"),
    ({"user_id": "a", "k": True}, "k must be a whole number from 1 to 100, got true"),
    ({"user_id": "a", "k": None}, "k must be a whole number from 1 to 100, got null"),
    ({"user_id": ""}, 'user_id must be a text of 1 to 128 characters, got ""'),
    ({"user_id": 12583}, "user_id must be a text of 1 to 128 characters, got 12583"),
    ({"user_id": "x" * 129}, "user_id must be a text of 1 to 128 characters, got "),
    ({"user_id": "\ud800"}, "user_id must be a text of 1 to 128 characters, got "),
    ({"item_ids": []}, "item_ids must be a list of 1 to 200 item ids, each a text of 1 to 128 characters, got a list of 0"),
    ({"item_ids": ["a"] * 201}, "item_ids must be a list of 1 to 200 item ids, each a text of 1 to 128 characters, got a list of 201"),
    ({"item_ids": "a"}, 'item_ids must be a list of 1 to 200 item ids, each a text of 1 to 128 characters, got "a"'),
    ({"item_ids": ["a", 7]}, "item_ids[1] must be a text of 1 to 128 characters, got 7"),
    ({"user_id": "a", "exclude": ["b"] * 1001}, "exclude must be a list of at most 1000 item ids, each a text of 1 to 128 characters, got a list of 1001"),
    ({"user_id": "a", "exclude": [None]}, "exclude[0] must be a text of 1 to 128 characters, got null"),
    ({"user_id": "a", "items": 3}, 'unknown field "items"; known are user_id, item_ids, session_id, k, exclude'),
    ({"user_id": "a", "ü\n": 3}, 'unknown field "\\u00fc\\n"; known are user_id, item_ids, session_id, k, exclude'),
    ({"user_id": "a", "item_ids": ["b"]}, "give user_id or item_ids, not both"),
    ({"user_id": "a", "item_ids": ["b"], "session_id": "c"}, "give user_id or item_ids, not both"),
    ({}, "give user_id, item_ids or session_id"),
    ({"session_id": ""}, 'session_id must be a text of 1 to 128 characters, got ""'),
    ([], "the body must be a JSON object with user_id, item_ids, session_id, k, exclude, sent as application/json"),
    (None, "the body must be a JSON object with user_id, item_ids, session_id, k, exclude, sent as application/json"),
])
def test_a_wrong_request_is_told_what_to_change(client, body, detail):
    answer = client.post(ASK, content=json.dumps(body), headers={"content-type": "application/json"})
    assert problem(answer, 422, "invalid-request").startswith(detail)
    assert answer.json()["errors"][0]["detail"] == answer.json()["detail"]


def test_all_wrong_fields_are_listed(client):
    errors = client.post(ASK, json={"user_id": "", "k": 0, "exclude": [1]}).json()["errors"]
    assert [error["pointer"] for error in errors] == ["#/user_id", "#/k", "#/exclude/0"]
    assert len(client.post(ASK, json={"user_id": "a", "exclude": [1] * 1000}).json()["errors"]) == 10


@pytest.mark.parametrize("content", [b"{", b"{'user_id': 'a'}", b'{"user_id": "a",}', b"\xff\xfe", b"[" * 100_000, b'{"k": ' + b"9" * 5000 + b"}", b"nul"])
def test_malformed_json_is_a_400(client, content):
    assert "JSON" in problem(client.post(ASK, content=content, headers={"content-type": "application/json"}), 400, "invalid-json")


def test_a_body_of_another_type_or_none_at_all(client):
    for content, kind in ((b'{"user_id": "a"}', "text/plain"), (b"user_id=a", "application/x-www-form-urlencoded"), (b"", "application/json")):
        assert "sent as application/json" in problem(client.post(ASK, content=content, headers={"content-type": kind}), 422, "invalid-request")


def test_a_body_that_is_too_long_is_refused(client):
    content = json.dumps({"user_id": "a", "exclude": ["x" * 100] * (MAX_BODY // 100)}).encode()
    assert f"{MAX_BODY} bytes" in problem(client.post(ASK, content=content, headers={"content-type": "application/json"}), 413, "too-large")
    chunks = (content[i : i + 65536] for i in range(0, len(content), 65536))  # sent without a Content-Length
    problem(client.post(ASK, content=chunks, headers={"content-type": "application/json"}), 413, "too-large")


def test_the_longest_legal_request_is_not_too_long(client):
    body = {"item_ids": ["\U0001f600" * 128] * 200, "exclude": ["\U0001f600" * 128] * 1000, "k": 100}
    content = json.dumps(body, indent=1).encode()  # every character escaped
    assert 1_800_000 < len(content) < MAX_BODY
    assert client.post(ASK, content=content, headers={"content-type": "application/json"}).status_code == 200


@pytest.mark.parametrize("query", ["k=0", "k=101", "k=ten", "k=", "k=1.5", "k=%FF"])
def test_a_wrong_k_in_the_address(client, query):
    assert problem(client.get(f"/v1/items/x/similar?{query}"), 422, "invalid-request").startswith("k must be a whole number from 1 to 100, got ")


def test_an_unknown_query_field(client):
    assert problem(client.get("/v1/items/x/similar?n=5"), 422, "invalid-request") == 'unknown field "n"; known are k'


def test_addresses_and_methods_that_do_not_exist(client):
    for path in ("/nothing", "/v1", "/v1/recommendations/", "/v1/items/x", "/etc/passwd", "/%00", "/v1/%E0%80"):
        problem(client.get(path), 404, "not-found")
    answer = client.get(ASK)
    problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "POST"


def test_an_internal_error_tells_nothing_of_our_insides(client, shop, monkeypatch, caplog):
    live = client.app.state.live

    def broken(*_): raise RuntimeError("the secret is /home/shop/key")

    monkeypatch.setattr(live.current.recommender, "recommend", broken)
    answer = client.post(ASK, json={"user_id": "a"}, headers={"x-request-id": "trace-me"})
    assert problem(answer, 500, "internal") == "something went wrong here; the log knows it under the request_id"
    assert answer.headers["x-request-id"] == "trace-me"
    assert "secret" not in answer.text and "RuntimeError" not in answer.text


@pytest.mark.parametrize(("sent", "kept"), [
    ("abc-123_X.9", True), ("x" * 128, True), ("x" * 129, False), ("", False), ("a b", False), ("a\tb", False), ('<script>"', False),
])
def test_request_ids_come_back_if_they_are_sound(client, sent, kept):
    for answer in (client.get("/healthz", headers={"x-request-id": sent}), client.post(ASK, json={"user_id": "a"}, headers={"x-request-id": sent})):
        found = answer.headers["x-request-id"]
        assert found == sent if kept else re.fullmatch("[0-9a-f]{32}", found)
    assert answer.json()["request_id"] == found
    assert client.get("/healthz").headers["x-request-id"] != client.get("/healthz").headers["x-request-id"]


def test_without_a_champion(tmp_path):
    app = create_app(Settings(home=tmp_path))
    client = TestClient(app)
    assert problem(client.get("/readyz"), 503, "not-ready") == "no model is ready: the champion is being loaded"
    app.state.live.refresh()
    asked = client.get("/readyz"), client.post(ASK, json={"user_id": "a"}), client.get("/v1/items/a/similar")
    for answer, kind in zip(asked, ("not-ready", "no-model", "no-model"), strict=True):
        assert "has no champion of 'recommend' yet; train and promote one with: shopai run recommend" in problem(answer, 503, kind)
        assert int(answer.headers["retry-after"]) > 0
    assert client.get("/v1/models").json() == {"models": []}
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(("name", "value"), [("POLL_SECONDS", "soon"), ("POLL_SECONDS", "0"), ("LOG_LEVEL", "loud"), ("MODEL", "")])
def test_a_wrong_setting_is_named(monkeypatch, name, value):
    monkeypatch.setenv(f"SHOPAI_SERVE_{name}", value)
    with pytest.raises(UsageError, match=f"^SHOPAI_SERVE_{name}: .*{value!r}$"): get_serve_settings()


# --- fuzz: nothing that is sent makes a 500 ---

anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4), max_leaves=10)
name = st.text(st.characters(codec=None), max_size=140) | st.sampled_from(["nobody", "\x00", "\ud800", "a/b"])
names = st.lists(name, max_size=5)
nearly = st.fixed_dictionaries({}, optional={"user_id": name | anything, "item_ids": names | anything, "session_id": name | anything,
                                             "k": st.integers(-5, 200) | anything, "exclude": names | anything, "K": anything})


def sound(answer):
    if answer.status_code == 200: checked(answer, Recommendations)
    else: problem(answer, answer.status_code, {400: "invalid-json", 422: "invalid-request"}[answer.status_code])


@given(nearly | anything)
@settings(max_examples=400, deadline=None)
def test_fuzz_any_json(client, body):
    sound(client.post(ASK, content=json.dumps(body), headers={"content-type": "application/json"}))


@given(st.binary(max_size=200) | st.text(string.printable, max_size=200).map(str.encode))
@settings(max_examples=150, deadline=None)
def test_fuzz_any_bytes(client, content):
    sound(client.post(ASK, content=content, headers={"content-type": "application/json"}))


@given(st.text(max_size=200).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)))
@settings(max_examples=150, deadline=None)
def test_fuzz_any_item(client, item):
    "Odd ids that exist are asked of a real server in test_serving_faults.py, since the test client decodes an address twice."
    answer = client.get(f"/v1/items/{quote(item, safe='').replace('.', '%2E')}/similar")
    assert answer.status_code in (200, 404)
    ProblemDocument.model_validate(answer.json())


# --- documentation ---


def test_openapi_documents_every_answer_with_an_example_that_is_true(client):
    "Each example request is accepted, each example answer has the documented form, each problem is a problem document."
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {"/v1/recommendations", "/v1/items/{item_id}/similar", "/v1/models", "/v1/events", "/v1/shopai.js", "/healthz",
                                      "/readyz"}
    operation = document["paths"][ASK]["post"]
    for example in operation["requestBody"]["content"]["application/json"]["examples"].values(): RecommendationRequest.model_validate(example["value"])
    for example in document["components"]["schemas"]["RecommendationRequest"]["examples"]: RecommendationRequest.model_validate(example)
    Recommendations.model_validate(operation["responses"]["200"]["content"]["application/json"]["example"], extra="forbid")
    similar = document["paths"]["/v1/items/{item_id}/similar"]["get"]
    SimilarItems.model_validate(similar["responses"]["200"]["content"]["application/json"]["example"], extra="forbid")
    assert {status for status in operation["responses"]} == {"200", "400", "413", "422", "500", "503"}
    assert {status for status in similar["responses"]} == {"200", "404", "422", "500", "503"}
    problems = [answer["content"] for path in document["paths"].values() for method in path.values()
                for status, answer in method["responses"].items() if status[0] != "2"]
    for content in problems: ProblemDocument.model_validate(content[MEDIA_TYPE]["example"], extra="forbid")
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_every_operation_is_described(client):
    for path in client.get("/openapi.json").json()["paths"].values():
        for operation in path.values(): assert len(operation["description"]) > 40 and operation["summary"]


# --- what the process needs ---


def test_the_process_holds_none_of_the_training_libraries(shop):
    "Import the app, load the champion, answer, and look at what Python has loaded."
    home, bought, _ = shop
    code = f"""
import asyncio, json, sys
from serving.app import create_app
from serving.config import get_serve_settings
from shopai.core.config import Settings, UsageError

app = create_app(Settings(home={str(home)!r}))
app.state.live.refresh()
sent = []

async def ask():
    body = {{"type": "http.request", "body": json.dumps({{"user_id": {str(bought.user_ids[0])!r}}}).encode()}}
    async def receive(): return body
    async def send(message): sent.append(message)
    scope = {{"type": "http", "asgi": {{"version": "3.0"}}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/v1/recommendations",
             "raw_path": b"/v1/recommendations", "query_string": b"", "root_path": "", "headers": [(b"content-type", b"application/json")]}}
    await app(scope, receive, send)

asyncio.run(ask())
assert sent[0]["status"] == 200, sent
needless = {{"torch", "mlflow", "pandas", "scipy", "pyarrow", "sklearn", "lightning", "feast", "matplotlib", "duckdb", "deltalake", "dagster", "onnxruntime",
            "confluent_kafka", "narwhals", "pyspark", "sqlalchemy"}}
print(json.dumps(sorted(needless & set(sys.modules))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
