"""What /metrics tells: requests, their outcomes, tokens, times and cache bytes; nothing of what was asked."""

from collections.abc import Collection
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cab_attention.generated_text import GeneratedText
from cab_attention.server.worker import Worker

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
SECONDS_A_TOKEN = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
METHODS = ("GET", "HEAD", "POST")
OTHER = "other"  # paths and methods that are not ours: clients choose how many there are


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry, "namespace": "cab_attention"}
        self.http = Counter(
            "http_requests", "Requests by path, method and status.", ["path", "method", "status"], **kept
        )
        self.http_seconds = Histogram(
            "http_request_seconds", "From request to answer.", ["path"], buckets=SECONDS, **kept
        )
        self.completions = Counter("completions", "Completions by eviction method and end.", ["method", "end"], **kept)
        self.prompt_tokens = Counter("prompt_tokens", "Of finished completions.", ["method"], **kept)
        self.completion_tokens = Counter("completion_tokens", "Of finished completions.", ["method"], **kept)
        self.cache_bytes = Counter("cache_bytes", "KV caches at the end of completions, summed.", ["method"], **kept)
        self.full_cache_bytes = Counter("full_cache_bytes", "The same without eviction.", ["method"], **kept)
        self.queue_seconds = Histogram("queue_seconds", "Wait for the turn.", buckets=SECONDS, **kept)
        self.prefill_seconds = Histogram("prefill_seconds", "Prompt to first token.", buckets=SECONDS, **kept)
        self.decode_seconds = Histogram(
            "decode_seconds_per_token", "Mean over a completion.", buckets=SECONDS_A_TOKEN, **kept
        )
        Gauge("requests_waiting", "For their turn.", **kept).set_function(lambda: worker.n_waiting)
        Gauge("requests_running", "0 or 1.", **kept).set_function(lambda: int(worker.is_busy))

    def count_finished(self, text: GeneratedText, queue_ms: float) -> None:
        """A completion that came to its end."""
        method = text.method.name
        self.completions.labels(method, text.finish_reason).inc()
        self.prompt_tokens.labels(method).inc(text.prompt_tokens)
        self.completion_tokens.labels(method).inc(text.completion_tokens)
        self.cache_bytes.labels(method).inc(text.cache_bytes)
        self.full_cache_bytes.labels(method).inc(text.full_cache_bytes)
        self.queue_seconds.observe(queue_ms / 1e3)
        self.prefill_seconds.observe(text.prefill_ms / 1e3)
        if text.decode_ms_per_token is not None:
            self.decode_seconds.observe(text.decode_ms_per_token / 1e3)

    def count_unfinished(self, method: str, end: str) -> None:
        """A completion that did not: it was `refused`, `cancelled`, or `failed`."""
        self.completions.labels(method, end).inc()


class CountRequests:
    """Counts and times every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self.app = app
        self.metrics = metrics
        self.paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else OTHER
        method = scope["method"] if scope["method"] in METHODS else OTHER
        started = perf_counter()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.http.labels(path, method, str(message["status"])).inc()
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            self.metrics.http_seconds.labels(path).observe(perf_counter() - started)
