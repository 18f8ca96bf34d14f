"""The app under uvicorn, on an address that is taken before a model is loaded."""

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

MORE_CONNECTIONS = 64  # than may wait in the queue: to be told that it is full, and for the page and /health
GRACE_SECONDS = 5  # at a shutdown, for clients to read the end of their answers


def take_address(host: str, port: int) -> socket.socket:
    """A socket that listens, so that no other can; port 0 takes a free one. Raises ValueError where that cannot be."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port={port}, allowed is 0 to 65535 (0: a free one)")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        taken = socket.socket(family)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
            taken.listen()
        except OSError:
            taken.close()
            raise
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    return taken


class Server(uvicorn.Server):
    """One app. `on_ready` is called when requests are answered; shutting down ends those that run."""

    def __init__(self, app: FastAPI, on_ready: Callable[[], None] = lambda: None) -> None:
        # No access log: addresses and paths are the clients' own. No headers of proxies: nothing here reads them.
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=app.state.worker.max_queue + MORE_CONNECTIONS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        super().__init__(config)
        self._worker = app.state.worker
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.stop()  # uvicorn itself would wait for the answers that run
        await super().shutdown(sockets)
