"""A middleware for vLLM's server that asks for the key on every route.

vLLM itself asks for the key only on routes such as /v1. Its other routes, such as /invocations, also run the model.
Tested in tests/rollout/test_generate.py.
"""

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

OPEN = ("/health",)
"""The routes that need no key."""


class KeyGuard:
    """Answers 401 to requests without the key in VLLM_API_KEY, except on the routes in OPEN."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app, self._key = app, f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan" and scope["path"] not in OPEN:
            sent = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(sent, self._key):
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b"the key is missing or wrong"})
                return
        await self._app(scope, receive, send)
