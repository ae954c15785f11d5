"""Keys struck out of texts that are shown or kept; knows nothing of where the texts came from."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from urllib.parse import quote

STRUCK = "***"
_SHORTEST = 6  # characters; a shorter key is part of too many words, and no secret


def strike(text: str, secrets: Iterable[str]) -> str:
    """``text`` with each of ``secrets`` replaced by ``***``, also as it stands in a URL or in base64.

    A key of fewer than six characters is struck out behind ``Bearer`` only.
    """
    for secret in secrets:
        if not secret:
            continue
        forms = {f"Bearer {secret}"}
        if len(secret) >= _SHORTEST:
            raw = secret.encode("utf-8", "surrogatepass")
            coded = (encode(raw).decode().rstrip("=") for encode in (base64.b64encode, base64.urlsafe_b64encode))
            forms |= {secret, quote(secret, safe="", errors="replace"), *coded}
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, STRUCK)
    return text
