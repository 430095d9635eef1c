"What happens around every request, whatever it asks for: a name, a limit, and a last line of defence."

import re
import time
import uuid

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.logs import event
from serving.problems import INTERNAL, Problem, response
from serving.schemas import MAX_BODY

TOO_LONG = f"the body must not be longer than {MAX_BODY} bytes"
SOUND_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestContext:
    "Gives each request its id, refuses a body that is too long, and turns an unforeseen error into a problem document that tells nothing of our insides."

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if SOUND_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, received, began = 0, 0, time.perf_counter()

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY: raise HTTPException(413, TOO_LONG)
            return message

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            announced = headers.get("content-length", "")
            if announced.isdecimal() and int(announced[:20]) > MAX_BODY:  # refused before a byte of it is read
                await response(Problem(413, "too-large", TOO_LONG), scope["path"], request_id)(scope, receive, named)
            else:
                await self.app(scope, limited, named)
        except Exception:
            event("error", "internal error", exc_info=True, request_id=request_id, method=scope["method"], path=scope["path"])
            if status:  # the answer is under way; nothing better can follow it
                raise
            problem = Problem(500, "internal", INTERNAL)
            await response(problem, scope["path"], request_id)(scope, receive, named)
        milliseconds = round((time.perf_counter() - began) * 1000, 2)
        event("debug", "answered", request_id=request_id, method=scope["method"], path=scope["path"], status=status, milliseconds=milliseconds)


class CrossOrigin:
    """Lets pages of the listed origins, and of no others, read the answers of one address (CORS).

    It stands around everything else, so that refusals have the headers, too: a page that can't read a 413 would send the same again. Cookies play no part, so
    there is no `Access-Control-Allow-Credentials`.
    """

    def __init__(self, app: ASGIApp, path: str, origins: frozenset[str]):
        self.app, self.path, self.origins = app, path, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self.path: return await self.app(scope, receive, send)
        origin = Headers(scope=scope).get("origin")

        async def shared(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.add_vary_header("Origin")
                if origin in self.origins:
                    headers["Access-Control-Allow-Origin"] = origin
                    headers["Access-Control-Expose-Headers"] = "Retry-After, X-Request-ID"
                    if scope["method"] == "OPTIONS":
                        headers.update({"Access-Control-Allow-Methods": "POST", "Access-Control-Allow-Headers": "Content-Type, X-Request-ID",
                                        "Access-Control-Max-Age": "86400"})
            await send(message)

        await self.app(scope, receive, shared)
