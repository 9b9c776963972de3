"""The listening socket, opened before anything heavy is imported so that a busy port is told at once."""

from __future__ import annotations

import socket

from jaxkv.config import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. ConfigError when the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM,
                                                      flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)  # before the model is loaded: a second server on this port fails here
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    sock.setblocking(False)
    return sock
