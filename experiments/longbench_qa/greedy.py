"""Greedy decoding: the argmax of the logits and nothing else, whatever the checkpoint's generation config holds."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cab_attention import EvictingCache, SharedPrefill
from experiments.longbench_qa.plain_cache import PlainCache


class GreedyDecoder:
    """Feeds tokens to a model through one cache and picks the next ones."""

    def __init__(self, model: PreTrainedModel, cache: EvictingCache | PlainCache | SharedPrefill) -> None:
        self.model = model
        self.cache = cache

    def step(self, ids: Tensor, forbidden: frozenset[int] = frozenset()) -> tuple[int, Tensor]:
        """Feed `ids` [1, n]; returns the next token as a number and as the next step's ids [1, 1].

        Raises RuntimeError if the model does not use the cache, FloatingPointError if the logits are not numbers.
        """
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        if output.past_key_values is not self.cache:
            raise RuntimeError("the model went on with a cache of its own: nothing would be evicted")
        logits = output.logits[0, -1]
        if forbidden:
            logits[list(forbidden)] = -torch.inf
        highest, token = logits.max(-1)  # NaN if any is
        value, number = torch.stack((highest.double(), token.double())).tolist()  # one wait for the GPU
        if not -torch.inf < value < torch.inf:
            raise FloatingPointError(f"the highest logit after {self.cache.get_seq_length()} tokens is {value}")
        return int(number), token.view(1, 1)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stop_at_newline: bool) -> frozenset[int]:
    """EOS ids of the generation config (there may be several) and of the tokenizer, and a newline's where asked for."""
    configured = model.generation_config.eos_token_id
    ids = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    if stop_at_newline:
        ids.append(tokenizer.encode("\n", add_special_tokens=False)[-1])
    return frozenset(token for token in ids if token is not None)
