"""Addresses of inference servers, where otherwise the name of a model stands."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from kdrun.errors import InputError

KEY = "KDRUN_API_KEY"
"""Environment variable with the server's key; the key stands nowhere else."""
_SCHEMES = ("http://", "https://")


def is_address(name: str | None) -> bool:
    """Return whether a model is named by the address of a server."""
    return name is not None and name.lower().startswith(_SCHEMES)


def clean_address(given: str, key: str) -> str:
    """Return an address without a trailing ``/v1`` or slash.

    Args:
        given: the address.
        key: key of the configuration that gives it, for messages.

    Raises:
        InputError: it has no host, an impossible port, a login, a query or a fragment.
    """
    try:
        parts = urlsplit(given)
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError as error:
        raise InputError(f"{key}: not an address ({error}); write http://HOST:PORT") from error
    if any(letter.isspace() or not letter.isprintable() for letter in given):
        raise InputError(f"{key}: not an address ({given!r} has a space); write http://HOST:PORT")
    if not host:
        raise InputError(f"{key}: {given!r} names no host; write http://HOST:PORT")
    if parts.username is not None or parts.password is not None:
        raise InputError(
            f"{key}: no login belongs into an address, which is recorded; put the server's key "
            f"into the environment variable {KEY}"
        )
    if parts.query or parts.fragment:
        raise InputError(
            f"{key}: the address has a query or fragment, which may be a secret; write "
            "http://HOST:PORT"
        )
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme.lower()}://{parts.netloc}{path}"


def is_loopback(address: str) -> bool:
    """Return whether an address stays on this machine."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
