"""A real server on a free port, in a thread of the test's process, and requests to it."""

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI

from cab_attention.server.app import create_app
from cab_attention.server.run import Server, take_address
from cab_attention.server.settings import Settings
from cab_attention.text_generation import TextGenerator

JSON = {"Content-Type": "application/json"}


@dataclass
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """Of server-sent events, the data."""
        parts = self.body.decode().split("\n\n")
        assert parts.pop() == "" and all(part.startswith("data: ") for part in parts)
        return [part.removeprefix("data: ") for part in parts]


@dataclass
class Served:
    port: int
    app: FastAPI
    server: Server
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        connection = self.connect()
        connection.request(method, path, body, {**self.headers, **headers})
        answer = connection.getresponse()
        reply = Reply(answer.status, answer.headers, answer.read())
        connection.close()
        return reply

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, **headers)

    def complete(self, **body: Any) -> Reply:
        return self.request("POST", "/v1/completions", json.dumps(body), **JSON)

    def metric(self, line: str) -> float:
        """The value in the line of /metrics that begins so; 0 if there is none."""
        lines = self.get("/metrics").body.decode().splitlines()
        return next((float(found.rsplit(" ", 1)[1]) for found in lines if found.startswith(line)), 0.0)


@contextmanager
def serving(generator: TextGenerator, **settings: Any) -> Iterator[Served]:
    """A server with this generator; it is shut down at the end."""
    address = take_address("127.0.0.1", 0)
    ready = threading.Event()
    app = create_app(generator, Settings("demo", **settings))
    server = Server(app, ready.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([address])), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield Served(address.getsockname()[1], app, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


class Endless(TextGenerator):
    """No token ends a text."""

    @property
    def end_tokens(self) -> frozenset[int]:
        return frozenset()
