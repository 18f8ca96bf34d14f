"""POST /v1/completions, plain and streamed."""

import asyncio
import time
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from cab_attention.server.completion_plan import Finished, Plan, generation, make_plan
from cab_attention.server.completion_request import CompletionRequest
from cab_attention.server.completion_response import CacheReport, Choice, Completion, report_of, usage_of
from cab_attention.server.errors import ApiError, failed
from cab_attention.server.metrics import Metrics
from cab_attention.server.settings import Settings
from cab_attention.server.worker import CancelledError, Job, QueueFullError, ShuttingDownError, Worker
from cab_attention.text_generation import TextGenerator

PATHS = ("/v1/completions", "/completions")
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def completion_routes(generator: TextGenerator, worker: Worker, settings: Settings, metrics: Metrics) -> APIRouter:
    """The route, under both paths."""

    async def create_completion(asked: CompletionRequest, request: Request) -> Any:
        """Complete a prompt. With `stream` the answer comes as server-sent events, ended by `data: [DONE]`."""
        plan = make_plan(asked, settings)
        job = _submitted(worker, generation(generator, plan))
        answer = Answer(job, plan, settings.model_name, metrics)
        async with cancelled_when_gone(request.receive, job):
            if asked.stream:
                # Its first piece tells whether it is refused: the status must be known before anything is sent.
                return EventStream(answer, await anext(answer.pieces, None), asked.wants_usage_chunk)
            async for _ in answer.pieces:
                pass
            return answer.whole()

    router = APIRouter()
    for path in PATHS:
        router.add_api_route(path, create_completion, methods=["POST"], response_model=Completion, responses=STREAMED)
    return router


def _submitted(worker: Worker, work: Generator[str, None, Finished]) -> Job[Finished]:
    try:
        return worker.submit(work)
    except QueueFullError:
        message = f"the queue is full ({worker.max_queue} requests), come back later"
        raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"}) from None
    except ShuttingDownError:
        raise _shutting_down() from None


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})


class Answer:
    """A job's pieces, its errors as those of the API, and what it is answered with."""

    def __init__(self, job: Job[Finished], plan: Plan, model: str, metrics: Metrics) -> None:
        self.job = job
        self.pieces = self._pieces()
        self._plan = plan
        self._metrics = metrics
        self._model = model
        self._id = f"cmpl-{uuid4().hex}"
        self._created = int(time.time())

    async def _pieces(self) -> AsyncIterator[str]:
        end = "cancelled"
        try:
            async for piece in self.job:
                yield piece
            end = ""
        except ValueError as error:
            end = "refused"
            raise ApiError(400, str(error)) from None
        except CancelledError:
            raise ApiError(499, "the client is gone") from None  # nobody reads it; nginx's number, for the metrics
        except ShuttingDownError:
            raise _shutting_down() from None
        except Exception as error:
            end = "failed"
            raise failed(error) from None
        finally:
            if end:
                self._metrics.count_unfinished(self._plan.method.name, end)
            else:
                self._metrics.count_finished(self.finished.text, self.job.queue_ms)

    @property
    def finished(self) -> Finished:
        assert self.job.result is not None
        return self.job.result

    def whole(self) -> Completion:
        """The answer at once."""
        whole = self._completion(Choice(text=self.finished.text.text, finish_reason=self.finished.text.finish_reason))
        whole.usage, whole.cab_attention = usage_of(self.finished.text), self._report()
        return whole

    def chunk(self, piece: str) -> Completion:
        """One piece of the answer."""
        return self._completion(Choice(text=piece, finish_reason=None))

    def last_chunk(self) -> Completion:
        """Why it ended, and the report."""
        last = self._completion(Choice(text="", finish_reason=self.finished.text.finish_reason))
        last.cab_attention = self._report()
        return last

    def usage_chunk(self) -> Completion:
        """What it took; no piece."""
        usage = self._completion()
        usage.usage = usage_of(self.finished.text)
        return usage

    def _completion(self, *choices: Choice) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=list(choices))

    def _report(self) -> CacheReport:
        return report_of(self.finished, self._plan, self.job.queue_ms)


class EventStream(Response):
    """The answer as server-sent events. An error on the way is an event too, the last one."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, first: str | None, with_usage: bool) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answer = answer
        self._first = first
        self._with_usage = with_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with cancelled_when_gone(receive, self._answer.job):
            async for event in self._events():
                await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[str]:
        answer = self._answer
        try:
            if self._first is not None:
                yield answer.chunk(self._first).model_dump_json(exclude={"cab_attention"})
            async for piece in answer.pieces:
                yield answer.chunk(piece).model_dump_json(exclude={"cab_attention"})
        except ApiError as error:
            yield error.body.model_dump_json()
            return
        yield answer.last_chunk().model_dump_json()
        if self._with_usage:
            yield answer.usage_chunk().model_dump_json(exclude={"cab_attention"})
        yield "[DONE]"


@asynccontextmanager
async def cancelled_when_gone(receive: Receive, job: Job) -> AsyncIterator[None]:
    """Within, the job is cancelled as soon as the client has closed its connection, or anything is raised."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except BaseException:
        job.cancel()
        raise
    finally:
        watcher.cancel()
