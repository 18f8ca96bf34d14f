"""SIGTERM and Ctrl-C: close what is open at once, even while a long computation holds the main thread."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)
NOTICES = (signal.SIGUSR1, signal.SIGUSR2)  # a cluster's, if something (submitit) has set a handler: the time is up
_closes: list[Callable[[], None]] = []  # of the contexts entered, the innermost last


@contextmanager
def closing_on_signals(close: Callable[[], None]) -> Iterator[None]:
    """While inside, a signal runs `close` in a thread of its own and ends the process with 128 + its number.

    Python runs signal handlers in the main thread between two of its instructions, so one that waits for a GPU would
    come too late. The byte that the interpreter writes on arrival wakes a thread instead. Outside the main thread,
    where no handlers can be set, nothing is changed.

    Contexts nest: the innermost one's `close` is run, and no other.

    Where a handler is set already, it has the last word: it is run after `close`, in the same thread. If it raises
    SystemExit, the process ends so; if it returns, the process waits, closed, for its end or the next signal. submitit
    sets two in a Slurm job. SIGTERM's does nothing, because a preempted job that ended by itself would not be started
    again; SIGUSR2's, before the time limit, has Slurm start the job again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _closes.append(close)
    try:
        if len(_closes) == 1:
            with _watching_signals():
                yield
        else:
            yield
    finally:
        _closes.pop()


def tell_between_cells() -> None:
    """What there is to close, and to say, while no cell is open."""
    print("interrupted: the same command goes on from what is recorded", file=sys.stderr, flush=True)


@contextmanager
def _watching_signals() -> Iterator[None]:
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = {number: signal.getsignal(number) for number in (*SIGNALS, *NOTICES)}
    watched = [number for number in before if number in SIGNALS or callable(before[number])]

    def wait() -> None:
        closed = False
        with receiver:
            while received := receiver.recv(1):  # nothing, once the sender is closed
                number = received[0]
                if number not in watched:  # every signal with a handler writes its byte, as SIGCONT under submitit
                    continue
                if not closed:
                    closed = True
                    _close_innermost()
                _end(number, before[signal.Signals(number)])

    # Handlers that do nothing: the default ones would end the process or raise in the main thread.
    for number in watched:
        signal.signal(number, lambda *_: None)
    wakeup_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number in watched:
            signal.signal(number, before[number])
        sender.close()


def _close_innermost() -> None:
    try:
        for close in _closes[-1:]:
            close()
    except Exception as error:
        print(f"error: {error}", file=sys.stderr, flush=True)


def _end(number: int, handler: object) -> None:
    """End the process, closed as it is, as the handler that was set before does; returns if that one does."""
    if not callable(handler) or handler is signal.default_int_handler:
        os._exit(128 + number)
    try:
        handler(number, None)
    except SystemExit as end:
        os._exit(end.code & 0xFF if isinstance(end.code, int) else 1)
    except BaseException as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(128 + number)
