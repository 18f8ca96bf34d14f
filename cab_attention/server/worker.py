"""One thread that owns the model and does one request after the other, in the order in which they came."""

import asyncio
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Generator
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, TypeVar

R = TypeVar("R")


class QueueFullError(Exception):
    """As many requests wait as may."""


class ShuttingDownError(Exception):
    """The worker was stopped."""


class CancelledError(Exception):
    """The job was cancelled."""


class PanicError(Exception):
    """A generator raised what is no Exception, such as a panic in Rust code; its traceback says where."""


@dataclass(frozen=True)
class _End(Generic[R]):
    result: R


class Job(Generic[R]):
    """A generator that the worker runs, seen from the event loop: iterate over its pieces, then read `result`.

    Empty pieces are passed over: a generator gives them so that it can be cancelled there. Iterating raises what the
    generator raised, `PanicError`, `CancelledError` or `ShuttingDownError`. Cancelling frees its place in the queue at
    once; once it runs, what it holds is freed after the piece at which it is.

    Attributes:
        result: what the generator returned, after its last piece.
        queue_ms: from its submission to its turn; 0 before.
    """

    def __init__(self, work: Generator[str, None, R], worker: "Worker") -> None:
        self.result: R | None = None
        self.queue_ms = 0.0
        self.stopped = False  # read by the worker between two pieces
        self._work: Generator[str, None, R] | None = work
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | _End[R] | Exception] = asyncio.Queue()
        self._submitted = perf_counter()

    async def __aiter__(self) -> AsyncIterator[str]:
        while True:
            event = await self._events.get()
            if isinstance(event, str):
                yield event
            elif isinstance(event, _End):
                self.result = event.result
                return
            else:
                raise event

    def cancel(self) -> None:
        """Go no further; called again, or after the end, nothing happens."""
        self._worker.give_up(self, CancelledError())

    def run(self) -> "_End[R] | Exception":
        """In the worker's thread: to the end, or until it is stopped; returns the event to end with."""
        work, self._work = self._work, None  # what it holds is freed with this frame
        assert work is not None
        self.queue_ms = (perf_counter() - self._submitted) * 1e3
        try:
            while not self.stopped:
                if piece := next(work):
                    self.post(piece)
            work.close()
            return CancelledError()
        except StopIteration as end:
            return _End(end.value)
        except Exception as error:
            _release_frames(error)
            return error
        except BaseException as error:  # the thread must outlive it; raised in an event loop it would end that
            _release_frames(error)
            return PanicError().with_traceback(error.__traceback__)

    def post(self, event: "str | _End[R] | Exception") -> None:
        """Hand an event to who iterates, from any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody iterates any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class Worker:
    """The thread and its queue. `max_queue` jobs may wait beside the one that runs."""

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self._changed = threading.Condition()  # its lock may be taken again by who holds it
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="cab-attention worker", daemon=True)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_busy(self) -> bool:
        return self._running is not None

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def submit(self, work: Generator[str, None, R]) -> Job[R]:
        """Put a job at the queue's end, from an event loop. Raises QueueFullError or ShuttingDownError."""
        job = Job(work, self)
        with self._changed:
            if self._stopping:
                raise ShuttingDownError
            if len(self._waiting) + (self._running is not None) > self.max_queue:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify()
        return job

    def give_up(self, job: Job, why: Exception) -> None:
        """Take a job out of the queue, or stop it after the piece at which it is; who iterates gets `why`."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            elif job is not self._running or job.stopped:
                return
            job.stopped = True
            job.post(why)

    def stop(self) -> None:
        """Take no more jobs and give up all that are there; returns at once."""
        with self._changed:
            self._stopping = True
            for job in [*self._waiting, *([self._running] if self._running else [])]:
                self.give_up(job, ShuttingDownError())
            self._changed.notify()

    def join(self, timeout: float) -> None:
        """Wait for the thread: one forward of the model at most, or `timeout` seconds."""
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                event = job.run()
                with self._changed:
                    self._running = None  # before the answer: who has it may come again at once
                    if not job.stopped:
                        job.post(event)
                del job, event
        finally:
            self.stop()  # should the thread itself fail, nobody waits for it

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running


def _release_frames(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold, a cache among it; where it happened can still be read."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
