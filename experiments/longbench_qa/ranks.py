"""The processes that torchrun starts for one model under tensor parallelism.

Rank 0 runs the study as one process does. The others follow: they make each call of the model that it makes, with the
same arguments, and do nothing else. What they say to each other goes over gloo, apart from the model's own
communication, so that a rank whose computation failed can still say so.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

# What the model's own communication waits for a rank at most, and for how long the ranks may differ in ending a call:
# they end one within milliseconds, unless one has failed and the others wait for it in the middle of a forward.
COMPUTING, ENDING = timedelta(minutes=10), timedelta(minutes=2)
# Followers wait for rank 0's next call, and that may be busy with something else; its end is noticed at once.
IDLE = timedelta(days=7)

Call = tuple[Any, str, dict[str, Any]]
"""A model's config, the method to call on that model, and its arguments."""

_groups: dict[timedelta, distributed.ProcessGroup] = {}  # by how long they wait
_broken: list[str] = []  # why the ranks can do nothing together any more


class OutOfStepError(RuntimeError):
    """The ranks are not at the same place of the computation: they cannot go on together."""


def n_ranks() -> int:
    """Processes that work on one model: those that torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


def is_follower() -> bool:
    """This process is not rank 0."""
    return n_ranks() > 1 and int(os.environ["RANK"]) > 0


@contextmanager
def joined() -> Iterator[None]:
    """While inside, the ranks are connected, each to its GPU. At the end rank 0 lets the others end too."""
    if n_ranks() == 1:
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # NCCL is told its GPU here: it would guess, and make a communicator of its own for each guess.
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=COMPUTING, device_id=device)
    for timeout in (ENDING, IDLE):
        _groups[timeout] = distributed.new_group(backend="gloo", timeout=timeout)  # type: ignore[assignment]
    try:
        yield
    finally:
        if _broken:  # an orderly end would wait for ranks that never come; torchrun ends those
            print(f"error: {_broken[0]}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        if not is_follower():
            _send(None)
        _groups.clear()
        distributed.destroy_process_group()


def lead(config: Any, name: str, /, **arguments: Any) -> None:
    """On rank 0: have the others call the method `name` of the model of this config. Elsewhere nothing."""
    if n_ranks() > 1 and not is_follower():
        if _broken:
            raise OutOfStepError(_broken[0])
        _send((config, name, arguments))


def _send(call: Call | None) -> None:
    distributed.broadcast_object_list([call], src=0, group=_groups[IDLE])


def follow(model_of: Callable[[Any], Any]) -> None:
    """On the other ranks: make rank 0's calls until it is done. `model_of` gives the model of a config."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's, which closes its records; torchrun ends the rest
    while (call := _receive()) is not None:
        config, name, arguments = call
        try:
            getattr(model_of(config), name)(**arguments)
        except OutOfStepError:
            raise
        except Exception:  # came out of `in_step`, so rank 0 has it too, and reports it
            continue


def _receive() -> Call | None:
    received: list[Call | None] = [None]
    distributed.broadcast_object_list(received, src=0, group=_groups[IDLE])
    return received[0]


@contextmanager
def in_step() -> Iterator[None]:
    """Around a computation that all ranks do: what fails on one fails on all.

    If any rank finished, every rank took part in all of its communication, and if all failed alike, they failed at the
    same place: they can go on. Otherwise `OutOfStepError` is raised: what one rank sends next would meet what another
    still waits for.
    """
    if n_ranks() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except OutOfStepError:
        raise
    except Exception as caught:
        error = caught
    texts = gather(None if error is None else f"{type(error).__name__}: {error}")
    failed = {rank: text for rank, text in enumerate(texts) if text is not None}
    if len(failed) == len(texts) and len({*texts}) > 1:
        _break(f"the ranks failed in different ways: {failed}")
    if error is not None:
        raise error
    for rank, text in failed.items():
        raise RuntimeError(f"rank {rank} failed: {text}")


def gather(value: Any) -> list[Any]:
    """Each rank's value, in order, on every rank. Raises OutOfStepError if one does not come."""
    if n_ranks() == 1:
        return [value]
    values = [None] * n_ranks()
    try:
        distributed.all_gather_object(values, value, group=_groups[ENDING])
    except RuntimeError as error:
        own = f", having failed itself: {value}" if isinstance(value, str) else ""
        _break(f"rank {distributed.get_rank()} waited for the others in vain{own} ({error})")
    return values


def _break(why: str) -> None:
    _broken.append(why)
    raise OutOfStepError(why)
