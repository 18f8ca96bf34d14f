"""Scores and kept positions of kvpress 0.5.5 on the fixed model, written to kvpress.json beside this file.

kvpress needs an older transformers than this project, so it runs in a virtual environment of its own. In the
repository's root:

    python3 -m venv .venv-kvpress
    .venv-kvpress/bin/pip install 'kvpress==0.5.5' 'torch>=2.11,<2.14' 'transformers<5.3'
    .venv-kvpress/bin/python -m tests.reference.kvpress_scores
"""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from kvpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.presses.base_press import BasePress
from transformers import DynamicCache

from tests.reference.fixed_model import N_TOKENS, fixed_ids, fixed_model

WINDOW = 8
BUDGETS = (17, 40)
PRESSES: dict[str, Callable[[float], BasePress]] = {
    "StreamingLLMPress": lambda ratio: StreamingLLMPress(ratio, n_sink=4),
    "SnapKVPress": lambda ratio: SnapKVPress(ratio, window_size=WINDOW, kernel_size=5),
    "TOVAPress": TOVAPress,
    "ObservedAttentionPress": ObservedAttentionPress,
    "KnormPress": KnormPress,
    "KeyDiffPress": KeyDiffPress,
    "ExpectedAttentionPress": lambda ratio: ExpectedAttentionPress(ratio, n_future_positions=512, n_sink=4),
    "PyramidKVPress": lambda ratio: PyramidKVPress(ratio, window_size=WINDOW, kernel_size=5, beta=20),
    "AdaKVPress": lambda ratio: AdaKVPress(SnapKVPress(ratio, window_size=WINDOW, kernel_size=5), alpha_safeguard=0.2),
}


def compression_ratio(name: str, budget: int) -> float:
    """PyramidKVPress computes with kept tokens as a real number, the others round them down."""
    return 1 - (budget if name == "PyramidKVPress" else budget + 0.5) / N_TOKENS


@torch.no_grad()
def scores_and_kept(name: str, budget: int) -> tuple[list, list]:
    """Scores and kept positions, both by layer and KV head, of one press at one budget."""
    model = fixed_model("eager" if name == "ObservedAttentionPress" else "sdpa")
    press = PRESSES[name](compression_ratio(name, budget))
    scorer = getattr(press, "press", press)  # AdaKVPress has the scores of the press in it
    score, scores = scorer.score, []

    def recording(*args):
        scores.append(score(*args))
        return scores[-1].clone()  # AdaKVPress writes into it

    scorer.score = recording
    full, cut = DynamicCache(), DynamicCache()
    model(fixed_ids(), past_key_values=full)
    with press(model):
        model(fixed_ids(), past_key_values=cut)
    kept = []
    for index, layer in enumerate(model.model.layers):
        is_kept = torch.ones(2, N_TOKENS, dtype=torch.bool)
        if name == "AdaKVPress":  # it hides keys and leaves them in the cache
            _, heads, positions = layer.self_attn.masked_key_indices
            is_kept[heads, positions] = False
        else:
            is_kept = (full.layers[index].keys[0, :, :, None] == cut.layers[index].keys[0, :, None]).all(-1).any(-1)
            assert is_kept.sum() == cut.layers[index].keys[0, :, :, 0].numel()
        kept.append([head.nonzero().flatten().tolist() for head in is_kept])
    return [[[float(f"{x:.7g}") for x in head] for head in layer[0].tolist()] for layer in scores], kept


def main() -> None:
    record: dict = {"versions": {name: version(name) for name in ("kvpress", "torch", "transformers")}}
    record |= {"ids": fixed_ids()[0].tolist(), "window": WINDOW, "budgets": BUDGETS}
    for name in PRESSES:
        for budget in BUDGETS:
            scores, kept = scores_and_kept(name, budget)
            record[f"{name} kept {budget}"] = kept
            if name != "StreamingLLMPress":  # its scores say kept or not
                assert record.setdefault(f"{name} scores", scores) == scores  # at any budget
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    (Path(__file__).parent / "kvpress.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
