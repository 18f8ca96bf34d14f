"""Loading a model for a command: quietly, and refusing a device that is not there."""

import torch
from transformers.utils import logging


def checked_device(name: str | None) -> torch.device:
    """The device of this name; default: the GPU if there is one. Raises ValueError if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r}, allowed is cpu or cuda (cuda:0, ...)") from None
    n_gpus = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= n_gpus):
        raise ValueError(f"device {name!r}, allowed is cpu or cuda (cuda:0, ...); this machine has {n_gpus} GPUs")
    return device


def quiet() -> None:
    """No progress bars, and of transformers' messages errors only."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
