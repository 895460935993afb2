"""What stands before every route: tokens, limits and deadlines, decided before a body is parsed.

A pure ASGI middleware. It reads the body itself, so that a body without a length is cut off as it
comes in, too, and one that comes too slowly does not hold a request for longer than its deadline.
"""

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from limits import RateLimitItem, parse
from limits.storage import storage_from_string
from limits.strategies import MovingWindowRateLimiter

from esper.controller.wire import DEADLINE_HEADER
from esper_serve.settings import MEMORY, ServiceSettings
from esper_serve.tokens import Token, identify

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# what load balancers ask, and what says how to ask
OPEN = ("/healthz", "/readyz", "/openapi.json", "/docs")
_HEADER = DEADLINE_HEADER.lower().encode()


class Refusal(Exception):
    """A request that is not answered; the message says what it must be."""

    def __init__(
        self,
        status: int,
        message: str,
        problems: tuple[str, ...] = (),
        retry_s: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, problems, retry_s)
        self.status, self.message, self.problems, self.retry_s = status, message, problems, retry_s

    def body(self) -> bytes:
        """The answer's body."""
        error = {"status": self.status, "message": self.message, "problems": list(self.problems)}
        return json.dumps({"error": error}).encode()

    def headers(self) -> dict[str, str]:
        """The answer's headers."""
        headers = {"content-type": "application/json"}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.retry_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_s)))
        return headers


class Guard:
    """The middleware.

    Args:
        app: What it stands before.
        settings: The limits.
        tokens: Who may ask.
        answered: Told the route (of the schema; 'none' without one) and status of every answer.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        settings: ServiceSettings,
        tokens: tuple[Token, ...],
        answered: Callable[[str, int], None],
    ) -> None:
        self._app, self._settings, self._tokens, self._answered = app, settings, tokens, answered
        rate: RateLimitItem = parse(settings.rate_limit)
        self._limit: Limit = (
            OwnLimit(rate)
            if settings.rate_storage == MEMORY
            else SharedLimit(rate, settings.rate_storage)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self._answered(route, message["status"])
            await send(message)

        if scope["path"] in OPEN:
            await self._app(scope, receive, counted)
            return
        try:
            scope["esper"] = asked = self._admitted(scope)
            body = await self._body(scope, receive, asked.ends)
        except Refusal as refusal:
            await _answer(counted, refusal)
            return
        await self._app(scope, _replay(body, receive), counted)

    def _admitted(self, scope: Scope) -> "Asked":
        headers = dict(scope["headers"])
        token = identify(self._tokens, headers.get(b"authorization", b""))
        if token is None:
            raise Refusal(401, "a valid bearer token must be given; ask whoever runs the service.")
        if (wait_s := self._limit.wait_s(token.name)) > 0:
            raise Refusal(
                429, f"'{token.name}' must ask at most {self._settings.rate_limit}; wait.",
                retry_s=wait_s,
            )  # fmt: skip
        budget_s, given = self._settings.max_deadline_s, headers.get(_HEADER)
        deadline_ms = None
        if given is not None:
            limit = int(1000 * budget_s)
            if not given.isdigit() or len(given) > 9 or not 1 <= int(given) <= limit:
                raise Refusal(
                    422, f"{DEADLINE_HEADER} must be whole milliseconds in 1..{limit}, "
                    f"but got '{given[:40].decode('latin-1')}'.",
                )  # fmt: skip
            deadline_ms = int(given)
            budget_s = deadline_ms / 1000
        return Asked(token, time.monotonic() + budget_s, deadline_ms)

    async def _body(self, scope: Scope, receive: Receive, ends: float) -> bytes:
        limit = self._settings.max_body_bytes
        too_long = Refusal(413, f"the body must have at most {limit} bytes, but has more; "
                           "send MessagePack.")  # fmt: skip
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and (len(length) > 18 or int(length) > limit):
            raise too_long
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(ends - time.monotonic()):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "the body must be complete, but the sender has gone.")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise too_long
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(
                408, "the body must arrive before the deadline, but did not.", retry_s=1
            ) from None


class Limit(Protocol):
    """How often one may ask."""

    def wait_s(self, name: str) -> float:
        """Count one request; how long whoever asks must wait, in s; 0 if this one is answered."""
        ...


class OwnLimit:
    """Counts in this process: so many requests at once, and after them one whenever its time comes.

    `limits` would keep the time of every request, and clears them away in a thread that takes more
    of the interpreter than the decisions do.

    Args:
        rate: Requests in a span of time.
    """

    def __init__(self, rate: RateLimitItem) -> None:
        self._span_s = float(rate.get_expiry())
        self._each_s = self._span_s / rate.amount
        # when each will have used up nothing again
        self._free = dict[str, float]()

    def wait_s(self, name: str) -> float:
        """Count one request, unless it must wait."""
        now = time.monotonic()
        free = max(now, self._free.get(name, 0.0)) + self._each_s
        # a hair more, for sums of floats
        if (wait_s := free - now - self._span_s) > 1e-9:
            return wait_s
        self._free[name] = free
        return 0.0


class SharedLimit:
    """Counts in a place that all replicas share.

    Args:
        rate: Requests in a span of time.
        url: Where; a URL that the package `limits` knows.
    """

    def __init__(self, rate: RateLimitItem, url: str) -> None:
        self._rate = rate
        self._limiter = MovingWindowRateLimiter(storage_from_string(url))

    def wait_s(self, name: str) -> float:
        """Count one request, unless it must wait."""
        if self._limiter.hit(self._rate, name):
            return 0.0
        reset: float = self._limiter.get_window_stats(self._rate, name).reset_time
        return max(1e-3, reset - time.time())


class Asked:
    """Who asks, and until when an answer is wanted.

    Attributes:
        token: Whose token it is.
        ends: When the deadline is over, by the monotonic clock, in s.
        deadline_ms: The deadline as it was given; None if it was not.
    """

    __slots__ = ("deadline_ms", "ends", "token")

    def __init__(self, token: Token, ends: float, deadline_ms: int | None) -> None:
        self.token, self.ends, self.deadline_ms = token, ends, deadline_ms

    def require_admin(self) -> None:
        """Refuse whoever may only ask for decisions.

        Raises:
            Refusal: With status 403.
        """
        if self.token.role != "admin":
            raise Refusal(
                403, f"an admin's token must be given for this, but '{self.token.name}' is a "
                f"{self.token.role}'s.",
            )  # fmt: skip

    def require_time(self) -> None:
        """Refuse an answer that nobody waits for any more.

        Raises:
            Refusal: With status 503.
        """
        if time.monotonic() > self.ends:
            raise Refusal(503, "the service must answer before the deadline, but is too busy.",
                          retry_s=1)  # fmt: skip


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then whatever else comes."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


async def _answer(send: Send, refusal: Refusal) -> None:
    headers = [(k.encode(), v.encode()) for k, v in refusal.headers().items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": refusal.body()})
