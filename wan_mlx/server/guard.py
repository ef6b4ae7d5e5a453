"""What every request must pass before a route sees it: the host's name, the token, the origin, the size of the body."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response

from .refused import Refused, reply

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

COOKIE = "wan_mlx_token"
OPEN = ("/health",)  # needs no token
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def names_of(host: str) -> set[str]:
    """The names by which a server that listens at ``host`` may be called; of addresses see `Guard`."""
    if is_loopback(host):
        return {*LOOPBACK, host}
    own = socket.gethostname().lower()
    return {*LOOPBACK, host.lower(), own, own.removesuffix(".local") + ".local"}


class Guard:
    """Refuses requests before they reach the app.

    - Host must be one of ``names``, or beyond loopback any address in digits: another site's name that was pointed at
      this machine (DNS rebinding) is never one of those.
    - Origin and Sec-Fetch-Site must not be of another site: there is no CORS.
    - With a ``token``: it must be in ``Authorization: Bearer``, or in the cookie that ``/?token=`` sets.
    - The body has at most ``most`` bytes, or, of JSON, ``most_json``.
    """

    def __init__(
        self, app: Any, names: Collection[str], token: str | None = None, most: int = 1 << 28, most_json: int = 1 << 26
    ):
        self.app, self.names, self.token, self.most, self.most_json = app, names, token, most, most_json
        self.beyond = not all(map(is_loopback, names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        try:
            answer = self._check(scope, Headers(scope=scope))
        except Refused as error:
            answer = reply(error.status, error, error.code, error.param)
        if answer is not None:
            for name, value in HEADERS.items():
                answer.headers[name] = value
            answer.headers["connection"] = "close"  # the rest of a body that nobody reads
            return await answer(scope, receive, send)
        await self.app(scope, self._counted(scope, receive), _with_headers(send))

    def _check(self, scope: Scope, headers: Headers) -> Response | None:
        """Raise `Refused`, or return an answer, if the app is not to be asked."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            raise Refused(421, f"Host is {', '.join(hosts) or 'missing'}, which is no name of this server", "bad_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit_or_none(origin) != hosts[0]:
            raise Refused(403, f"Origin is {origin}, expected this server's own pages", "bad_origin")
        if headers.get("sec-fetch-site") == "cross-site" and scope["path"] != "/":
            raise Refused(403, "another site's page asked for this, expected this server's own pages", "bad_origin")
        if self.token is not None and scope["path"] not in OPEN:
            asked = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[-1]
            if scope["path"] == "/" and asked and self._is_token(asked):
                found = RedirectResponse("/", 303)
                found.set_cookie(COOKIE, self.token, httponly=True, samesite="strict", max_age=400 * 86_400)
                return found
            if not self._is_token(_bearer(headers)) and not self._is_token(_cookie(headers)):
                raise Refused(401, "the token is missing or wrong; it is in the address that `wan-mlx serve` prints, "
                                   "programs send it as `Authorization: Bearer TOKEN`", "bad_token")  # fmt: skip
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise Refused(400, f"Content-Length is {length}, expected a number of bytes")
        if int(length) > self._most(headers):
            raise Refused(413, f"the body has {int(length):,} bytes, expected at most {self._most(headers):,}")
        return None

    def _most(self, headers: Headers) -> int:
        return self.most if headers.get("content-type", "").startswith("multipart/form-data") else self.most_json

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower().rstrip(".")
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            return self.beyond and bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), (self.token or "").encode())

    def _counted(self, scope: Scope, receive: Receive) -> Receive:
        """``receive``, which raises once the body is too long."""
        most, count = self._most(Headers(scope=scope)), 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > most:
                raise Refused(413, f"the body has more than {most:,} bytes, which are the most")
            return message

        return counted


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sent


def _bearer(headers: Headers) -> str:
    kind, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def _cookie(headers: Headers) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def urlsplit_or_none(origin: str) -> str | None:
    """Host and port of an origin; None of "null" and what is no address."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None
