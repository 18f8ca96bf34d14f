"""From a model's logits to the next token: temperature, top-k, top-p and a seed of its own."""

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token, whatever else is set.
        top_p: of the most likely tokens, as few as together have this probability (Holtzman et al. 2020,
            arXiv 1904.09751, section 3.1); 1 keeps all.
        top_k: this many of the most likely tokens; 0 keeps all. Taken before `top_p`.
        seed: of the draws. Nothing global is read or changed.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature!r}, allowed is a finite number >= 0")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p={self.top_p!r}, allowed is a number in (0, 1]")
        if not (_is_integer(self.top_k) and self.top_k >= 0):
            raise ValueError(f"top_k={self.top_k!r}, allowed is an integer >= 0 (0: all)")
        if not (_is_integer(self.seed) and 0 <= self.seed < 2**63):
            raise ValueError(f"seed={self.seed!r}, allowed is an integer in [0, 2**63)")

    def distribution(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Float64 probabilities and token ids, both [n], most likely first, of the tokens that may be drawn.

        `logits` is [V]. Needs a temperature above 0. Among equal logits the lower id comes first.
        """
        ranked, tokens = logits.double().sort(descending=True, stable=True)
        # Less the highest first: a tiny temperature must not overflow.
        probabilities = ((ranked - ranked[0]) / self.temperature).softmax(-1)
        if self.top_k:
            probabilities, tokens = probabilities[: self.top_k], tokens[: self.top_k]
            probabilities = probabilities / probabilities.sum()
        before = probabilities.cumsum(-1) - probabilities
        kept = max(1, int((before < self.top_p).sum()))
        return probabilities[:kept] / probabilities[:kept].sum(), tokens[:kept]


class Sampler:
    """Draws one token after the other, from a generator of its own: the same numbers on every device."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def draw(self, logits: Tensor) -> int:
        """The next token for logits [V]. Raises FloatingPointError if they are not numbers."""
        highest, most_likely = logits.max(-1)  # NaN if any is
        value, token = torch.stack((highest.double(), most_likely.double())).tolist()  # one wait for the GPU
        if not -math.inf < value < math.inf:
            raise FloatingPointError(f"the model's highest logit is {value}: no token can be chosen")
        if self.sampling.temperature == 0:
            return int(token)
        probabilities, tokens = self.sampling.distribution(logits)
        uniform = torch.rand((), dtype=torch.float64, generator=self._generator).item()
        drawn = int((probabilities.cumsum(-1) <= uniform).sum())  # the first whose cumulative probability is above
        return int(tokens[min(drawn, len(tokens) - 1)])


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
