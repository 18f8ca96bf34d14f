"""SIGTERM and Ctrl-C: close what is open at once, even while a long computation holds the main thread."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def closing_on_signals(close: Callable[[], None]) -> Iterator[None]:
    """While inside, a signal runs `close` in a thread of its own and ends the process with 128 + its number.

    Python runs signal handlers in the main thread between two of its instructions, so one that waits for a GPU would
    come too late. The byte that the interpreter writes on arrival wakes a thread instead. Outside the main thread,
    where no handlers can be set, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def wait() -> None:
        with receiver:
            received = receiver.recv(1)  # nothing, once the sender is closed
        if received:
            try:
                close()
            finally:
                os._exit(128 + received[0])

    # Handlers that do nothing: the default ones would end the process or raise in the main thread.
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    wakeup_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        sender.close()
