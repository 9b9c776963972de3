"""What one server lets its clients do: keys, bounds, deadlines, and the command-line options that set them.

Owns the values and their validation. Standard library only, so that ``--help`` starts no device.
"""

from __future__ import annotations

import argparse
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from jaxkv.config import ConfigError, parse_size

MAX_KEYS = 1024
_OWNER = "jaxkv.owner"  # where in an ASGI scope it stands


class KeyRing:
    """The API keys of a server as digests: the keys themselves are kept nowhere."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [sha256(key.encode()).digest() for key in dict.fromkeys(keys)]

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, token: bytes) -> int | None:
        """Number of the key that ``token`` is, in a time that does not depend on which; None for none."""
        digest, found = sha256(token).digest(), None
        for number, known in enumerate(self._digests):
            if hmac.compare_digest(digest, known):
                found = number
        return found

    def mark(self, scope: Any, number: int) -> None:
        """Lets ``owner_of`` know whose request it is: a digest that stays the same, and of which nobody learns the key."""
        scope[_OWNER] = hmac.digest(self._digests[number], b"owner of what is kept", "sha256").hex()


def owner_of(scope: Mapping[str, Any]) -> str:
    """Whom what a request makes belongs to: "" on a server without keys."""
    return str(scope.get(_OWNER, ""))


@dataclass(frozen=True)
class Limits:
    """Bounds on what requests may ask for. ConfigError names the option."""

    max_open_requests: int = 1024  # sequences running or waiting
    max_requests_per_key: int = 0  # HTTP requests under way at once with one key; 0: no bound
    max_body: int = 32 * 2**20  # bytes
    max_prompt_tokens: int = 0  # 0: what the model's window holds
    max_n: int = 128  # answers to one prompt
    request_timeout: float = 0.0  # seconds from a request's head to its last byte; 0: none
    step_timeout: float = 300.0  # seconds that one round of the engine may take; 0: any

    def __post_init__(self) -> None:
        for name, low in (("max_open_requests", 1), ("max_requests_per_key", 0), ("max_body", 1), ("max_prompt_tokens", 0),
                          ("max_n", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("request_timeout", "step_timeout"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a number of seconds from 0, got {getattr(self, name)}")


def add_limit_args(group: argparse._ArgumentGroup) -> None:
    """The options; ``limits_of`` and ``keys_of`` read them."""
    group.add_argument("--api-key", action="append", metavar="KEY", default=[],
                       help="bearer token asked for on /v1 and /debug, may be repeated; $JAXKV_API_KEY holds "
                            "several with commas between (default: none)")
    group.add_argument("--api-key-file", metavar="FILE",
                       help="more of them, one a line; unlike --api-key no other process sees them")
    default = Limits()
    for name, kind, metavar, text in (
            ("max_open_requests", int, "N", "sequences running or waiting before a 429"),
            ("max_requests_per_key", int, "N", "requests under way with one API key before a 429; 0: any number"),
            ("max_prompt_tokens", int, "N", "longest prompt; 0: what the model's window holds"),
            ("max_n", int, "N", "answers to one prompt"),
            ("request_timeout", float, "SECONDS", "a request that takes longer is ended; 0: never. The header "
                                                  "x-request-timeout may ask for less"),
            ("step_timeout", float, "SECONDS", "an engine that is busy with one step for longer has failed; 0: never")):
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, default=getattr(default, name),
                           help=f"{text} (default: %(default)s)")
    group.add_argument("--max-body", metavar="SIZE", default="32M", help="largest request body (default: 32M)")
    group.add_argument("--allowed-origins", nargs="+", metavar="ORIGIN", default=[],
                       help="web pages of these origins may call the server; '*': of all (CORS, default: none)")
    group.add_argument("--allow-credentials", action="store_true", help="they may send cookies and keys of the browser")


def limits_of(args: argparse.Namespace) -> Limits:
    """Raises ConfigError that names the option."""
    limits = Limits(args.max_open_requests, args.max_requests_per_key, parse_size(args.max_body, "max_body") or 0,
                    args.max_prompt_tokens, args.max_n, args.request_timeout, args.step_timeout)
    if args.allow_credentials and "*" in args.allowed_origins:
        raise ConfigError("allow_credentials needs named allowed_origins, not '*'")
    return limits


def keys_of(args: argparse.Namespace) -> KeyRing:
    """The keys of the options. Raises ConfigError, which quotes no key."""
    keys = [*args.api_key, *_read_keys(args.api_key_file)]
    if not all(keys):
        raise ConfigError("api_key must not be empty")
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"there may be at most {MAX_KEYS} API keys, got {len(keys)}")
    if args.max_requests_per_key and not keys:
        raise ConfigError("max_requests_per_key needs API keys")
    return KeyRing(keys)


def _read_keys(path: str | None) -> list[str]:
    """The lines of a key file but for empty ones and comments."""
    if path is None:
        return []
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text"
        raise ConfigError(f"api_key_file {path} cannot be read: {reason}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"api_key_file {path} holds no key")
    return keys
