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

SOUND_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestContext:
    "Gives each request its id, refuses a body that is too long, and turns an unforeseen error into a problem document that tells nothing of our insides."

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if SOUND_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, received, began = 0, 0, time.perf_counter()

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                raise HTTPException(413, f"the body must not be longer than {MAX_BODY} bytes")
            return message

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self.app(scope, limited, named)
        except Exception:
            event("error", "internal error", exc_info=True, request_id=request_id, method=scope["method"], path=scope["path"])
            if status:  # the answer is under way; nothing better can follow it
                raise
            problem = Problem(500, "internal", INTERNAL)
            await response(problem, scope["path"], request_id)(scope, receive, named)
        milliseconds = round((time.perf_counter() - began) * 1000, 2)
        event("debug", "answered", request_id=request_id, method=scope["method"], path=scope["path"], status=status, milliseconds=milliseconds)
