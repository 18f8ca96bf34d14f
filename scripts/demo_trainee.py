"""What the demo model's training computes: the loss of answers, and two auxiliary losses that make them learnable.

To find "Ada Kern 's badge is" again takes two steps at once: gathering name and attribute where the value stands, and
comparing them with those in the question. Neither pays without the other, and from answers alone 20000 steps did not
find both. So linear readers are asked for name, attribute and passage after the second layer, and in short contexts one
head of each of the two layers after it is told where to look.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from experiments.longbench_qa.demo.language import Exercise
from experiments.longbench_qa.demo.words import WORDS

READ_AFTER = 2  # layers
POINTING_LAYERS = (2, 3)  # from 0: at the first and at the last sentence that answers


class Trainee(torch.nn.Module):
    """The model, and what only its training needs: linear readers of the hidden states after layer `READ_AFTER`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.readers = torch.nn.Linear(model.config.hidden_size, 4 * len(WORDS))

    def forward(self, batch: Exercise) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of what follows at `places` [B, Q, A, words], of what is read for `about` [B, S * 3, 4, words], and of
        the attention at `asking` [B, Q, 2, 2, N].
        """
        with torch.autocast(
            batch.ids.device.type, dtype=torch.bfloat16, enabled=batch.ids.is_cuda, cache_enabled=False
        ):
            # Not model(...): while a graph is captured transformers would write out the causal mask, N x N.
            decoder = self.model.model
            hidden = decoder.embed_tokens(batch.ids)
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
            rotary = decoder.rotary_emb(hidden, positions)
            pointed = []
            for number, layer in enumerate(decoder.layers, 1):
                hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
                if number == READ_AFTER:
                    read = self.readers(decoder.norm(hidden[:, batch.about[0]])).unflatten(-1, (4, -1))
                if number in POINTING_LAYERS:
                    pointed.append(self.pointing(decoder.layers[number], hidden, rotary, batch.asking.flatten()))
            logits = self.model.lm_head(decoder.norm(hidden[:, batch.places]))
        return logits.float(), read.float(), torch.stack(pointed, 2).unflatten(1, batch.asking.shape)

    def pointing(self, layer: torch.nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], asking: Tensor) -> Tensor:
        """Attention logits [B, n, N] of the layer's first head, from the tokens at `asking` [n]."""
        attention, size = layer.self_attn, layer.self_attn.head_dim
        normed = layer.input_layernorm(hidden)
        keys = linear(normed, attention.k_proj.weight[:size])[:, None]
        queries = linear(normed, attention.q_proj.weight[:size])[:, None]
        queries, keys = apply_rotary_pos_emb(queries, keys, *rotary)
        logits = (queries[:, 0, asking] @ keys[:, 0].transpose(1, 2)).float() * attention.scaling
        return logits.masked_fill(torch.arange(hidden.shape[1], device=hidden.device) > asking[:, None], -torch.inf)


def losses_and_accuracy(trainee: Trainee, batch: Exercise) -> tuple[Tensor, Tensor]:
    """Mean losses [3] of answers, readers and pointing; the share of questions with every token of the answer right."""
    logits, read, pointed = trainee(batch)
    losses = (
        cross_entropy(logits.flatten(0, 2), batch.wanted.flatten()),
        cross_entropy(read.flatten(0, 2), batch.about[1].flatten()),
        cross_entropy(pointed.flatten(0, 3), batch.evidence.flatten()),
    )
    right = (logits.detach().argmax(-1) == batch.wanted).all(-1)
    return torch.stack(losses), right.float().mean()
