"""Time and memory: what a forward took, what is free, and what eager attention would need."""

import gc
import time
from pathlib import Path

import torch

# Bytes that eager attention holds per query head, query and key at its peak: logits, mask, float32 softmax and its
# cast. Measured on an H200 at 4k tokens: 11.9 in bfloat16 (7B shape), 13.6 in float32.
EAGER_BYTES = {2: 12, 4: 14}


class MemoryMeter:
    """Wall time in ms, and peak memory over what was allocated at the start (the weights), where there is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self.weights_bytes = torch.cuda.memory_allocated(self.device) if self.device else None

    def held_beside(self, own_bytes: int) -> int:
        """Bytes in use that are neither the weights' nor among `own_bytes`; 0 where there is no GPU."""
        if self.weights_bytes is None:
            return 0
        return max(0, torch.cuda.memory_allocated(self.device) - self.weights_bytes - own_bytes)

    def start(self) -> float:
        """Begin a stretch; returns what `stop` wants."""
        if self.device:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        return time.perf_counter()

    def stop(self, started: float) -> tuple[float, int | None]:
        """(ms since `start`, peak bytes over the weights since then or None)."""
        if self.device:
            torch.cuda.synchronize(self.device)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        if self.weights_bytes is None:
            return elapsed_ms, None
        return elapsed_ms, torch.cuda.max_memory_allocated(self.device) - self.weights_bytes


def one_after_the_other(first: tuple[float, int | None], second: tuple[float, int | None]) -> tuple[float, int | None]:
    """Time and peak of two stretches, as `MemoryMeter.stop` returns them, taken as one."""
    peaks = [peak for _, peak in (first, second) if peak is not None]
    return first[0] + second[0], max(peaks, default=None)


def free_memory() -> None:
    """Let go of what nothing refers to any more, also in PyTorch's own store of GPU memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Memory that a new tensor on this device could take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo does not say how much memory is available")


def refuse_eager_that_cannot_fit(model: torch.nn.Module, n_queries: int, n_keys: int) -> None:
    """Raise MemoryError if one layer's eager attention, heads x queries x keys, does not fit into what is free."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    per_weight = EAGER_BYTES[model.dtype.itemsize]  # type: ignore[union-attr, index]
    needed = config.num_attention_heads * n_queries * n_keys * per_weight
    free = free_bytes(model.device)  # type: ignore[arg-type]
    if needed > free:
        raise MemoryError(
            f"attention=eager needs about {needed / 2**30:.1f} GiB for one layer ({config.num_attention_heads} heads x "
            f"{n_queries} queries x {n_keys} keys x {per_weight} bytes), {free / 2**30:.1f} GiB are free"
        )
