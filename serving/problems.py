"Every error is a problem document (RFC 9457): one clear line for people, a stable `type` for programs, and nothing of our insides."

import json
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serving.schemas import A_TEXT, KNOWN, RULES, ProblemDocument

MEDIA_TYPE = "application/problem+json"
MOST_ERRORS = 10  # of one request, listed


class Problem(Exception):
    "Raise it anywhere below the app; the client gets the document."

    def __init__(self, status: int, kind: str, detail: str, headers: dict[str, str] | None = None, errors: list[dict[str, str]] | None = None):
        super().__init__(detail)
        self.status, self.kind, self.detail, self.headers, self.errors = status, kind, detail, headers, errors


def document(problem: Problem, path: str, request_id: str) -> dict[str, Any]:
    "The body of a problem, as a dict."
    body = {
        "type": f"urn:shopai:problem:{problem.kind}",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
        "instance": quote(path, errors="replace"),
        "request_id": request_id,
    }
    return body if problem.errors is None else {**body, "errors": problem.errors}


def response(problem: Problem, path: str, request_id: str) -> JSONResponse:
    return JSONResponse(document(problem, path, request_id), problem.status, problem.headers, MEDIA_TYPE)


def shown(value: Any) -> str:
    "A value short enough for one line; ASCII, so that even half a surrogate pair can be reported."
    if isinstance(value, list): return f"a list of {len(value)}"
    if isinstance(value, dict): return "an object"
    if isinstance(value, bytes): return "bytes"
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:39] + "…"


def _explain(error: dict[str, Any]) -> str:
    "One line for one of pydantic's errors: the field, the rule, and what came instead."
    place, *path = error["loc"]
    if not path and error["type"] == "value_error": return str(error["ctx"]["error"])
    if not path or place not in KNOWN: return f"the body must be a JSON object with {', '.join(KNOWN['body'])}, sent as application/json"
    if error["type"] == "extra_forbidden": return f"unknown field {shown(path[0])}; known are {', '.join(KNOWN[place])}"
    name, rule = (path[0], RULES[path[0]]) if len(path) == 1 else (f"{path[0]}[{path[1]}]", A_TEXT)
    return f"{name} must be {rule}, got {shown(error['input'])}"


def invalid(errors: list[dict[str, Any]]) -> Problem:
    "The problem that tells a client what is wrong with its request."
    first = errors[0]
    if first["type"] == "json_invalid":
        return Problem(400, "invalid-json", f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    lines = [{"pointer": "#" + "".join(f"/{quote(ascii(part)[1:-1] if isinstance(part, str) else str(part))}" for part in error["loc"][1:]),
              "detail": _explain(error)} for error in errors[:MOST_ERRORS]]
    return Problem(422, "invalid-request", lines[0]["detail"], errors=lines)


def _from_http(error: HTTPException) -> Problem:
    "The framework's own errors, in the same form."
    status = error.status_code
    if status == 404: return Problem(404, "not-found", "there is nothing at this address; GET / lists what there is")
    if status == 405: return Problem(405, "method-not-allowed", "this address knows other methods; see the Allow header", error.headers)
    if status == 400: return Problem(400, "invalid-json", "the body could not be read as JSON")
    if status == 413: return Problem(413, "too-large", str(error.detail))
    return Problem(status, "http", str(error.detail), error.headers)


def install(app: FastAPI) -> None:
    "Make `app` answer every error it raises as a problem document."

    def handler(to_problem):
        async def handle(request: Request, error: Exception) -> JSONResponse:
            return response(to_problem(error), request.url.path, request.state.request_id)

        return handle

    app.add_exception_handler(Problem, handler(lambda error: error))
    app.add_exception_handler(RequestValidationError, handler(lambda error: invalid(error.errors())))
    app.add_exception_handler(HTTPException, handler(_from_http))


INTERNAL = "something went wrong here; the log knows it under the request_id"


def documented(status: int, kind: str, detail: str, path: str = "/v1/recommendations") -> dict[int, dict[str, Any]]:
    "The entry of a problem in OpenAPI, with an example."
    example = document(Problem(status, kind, detail), path, "5f0c1f6e9d5b4a0f8e0a3f5b1c2d3e4f")
    schema = ProblemDocument.model_json_schema()
    return {status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": schema, "example": example}}}}
