"""Answer kept: the share of the answer's tokens in the context that survive eviction."""

from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.longbench_qa.encoding import EncodedPrompt


def answer_tokens(encoded: EncodedPrompt, answers: Sequence[str], span: tuple[int, int] | None = None) -> list[int]:
    """Indices of the prompt's tokens that overlap the answer in the context.

    Its place is `span`, in characters of the context, where the data set says it and the context is whole. Else all
    occurrences of all answers count, upper and lower case alike; the list is empty if there is none.
    """
    start, end = encoded.context
    folded, origin = _fold(encoded.text[start:end])
    characters: set[int] = set()
    if span is not None and not encoded.truncated:
        characters, answers = {start + index for index in range(*span)}, ()
    for answer in answers:
        wanted, _ = _fold(answer.strip())
        at = folded.find(wanted) if wanted else -1
        while at >= 0:
            characters.update(start + origin[i] for i in range(at, at + len(wanted)))
            at = folded.find(wanted, at + 1)
    return [
        index
        for index, (first, last) in enumerate(encoded.offsets)
        if any(character in characters for character in range(first, last))
    ]


def _fold(text: str) -> tuple[str, list[int]]:
    """Case-folded text, and for each of its characters where it comes from: folding can lengthen (ß -> ss)."""
    pieces = [character.casefold() for character in text]
    return "".join(pieces), [index for index, piece in enumerate(pieces) for _ in piece]


def shares_kept(tokens: Sequence[int], positions: Sequence[Tensor]) -> list[list[float]] | None:
    """By layer and KV head, the share of `tokens` among the kept positions, each [1, G, kept].

    None if there are no tokens to look for.
    """
    if not tokens:
        return None
    one_device = positions[0].device  # layers may lie on several
    wanted = torch.tensor(tokens, device=one_device)
    counts = [torch.isin(layer[0], wanted.to(layer.device)).sum(-1).to(one_device) for layer in positions]
    return (torch.stack(counts).double() / len(tokens)).tolist()  # one wait for the GPU
