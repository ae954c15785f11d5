"""Who may ask: names that a server answers to, and what pages of other sites send; the headers of every answer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send

from coala.values import CoalaError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# A name or an address in brackets, then perhaps a port, then nothing.
HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[^\[\]:/@\s]+))(?::[0-9]{1,5})?", re.ASCII)


def security_headers(**policy: str) -> dict[str, str]:
    """Headers of every answer; ``policy`` adds to a content security policy that allows what comes from here alone.

    The referrer stays within the site: a browser that tells nobody where a form comes from does not tell us either.
    """
    rules = {
        "default-src": "'none'",
        "style-src": "'self'",
        "script-src": "'self'",
        "img-src": "data:",
        "form-action": "'none'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }
    rules |= {name.replace("_", "-"): value for name, value in policy.items()}
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in rules.items()),
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "X-Robots-Tag": "noindex",
        # A page from a cache could show what was replaced since, or one person's page to another.
        "Cache-Control": "no-store",
    }


def headed(send: Send, headers: Mapping[str, str]) -> Send:
    """``send``, with ``headers`` on every answer."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(headers)
        await send(message)

    return sending


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets, in small letters; nothing for what is no host."""
    found = HOST.fullmatch(host)
    return "" if found is None else (found["address"] or found["name"]).lower()


def known_host(headers: Headers, names: Collection[str]) -> bool:
    """Whether a request came under one of ``names``, all in small letters.

    Answering to these alone keeps pages of other sites from reaching a server under a name of their own that leads
    here (DNS rebinding).
    """
    return host_name(headers.get("host", "localhost")) in names


def foreign(headers: Headers, site: str | None = None) -> bool:
    """Whether a page of another site sent the request, as far as a browser tells; other programs need not say.

    ``site`` is the server's own origin where a proxy stands before it.
    """
    fetched = headers.get("sec-fetch-site")
    if fetched is not None:
        return fetched.strip().lower() not in ("same-origin", "none")
    origin = headers.get("origin")
    if origin is None:
        return False
    own = headers.get("host", "").lower()
    return origin.lower() != site and origin.lower() not in (f"http://{own}", f"https://{own}")


def origin_of(site: str) -> str:
    """SCHEME://HOST[:PORT] of a web address; :class:`CoalaError` for what is none, or leads to a page."""
    try:
        parts = urlsplit(site.strip().lower())
        known = {"http": 80, "https": 443}
        port = parts.port
    except ValueError:
        parts, known, port = urlsplit(""), {}, None
    host = parts.netloc
    if parts.scheme not in known or not host_name(host) or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise CoalaError(f"The site is {site!r}; expected an address such as https://survey.example, without a path.")
    if port == known[parts.scheme]:
        host = host.rpartition(":")[0]
    return f"{parts.scheme}://{host}"


def names_of(site: str | None) -> Mapping[str, None]:
    """Names that a server on loopback answers to: this machine's own, and that of its ``site`` (an origin)."""
    return dict.fromkeys((*LOOPBACK, *([] if site is None else [host_name(site.partition("://")[2])])))
