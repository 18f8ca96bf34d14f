"""The demo model's tokenizer: one token a word of demo_qa's language."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from experiments.longbench_qa.demo.words import BOS, ID


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, "'s" and punctuation apart; it puts <bos> first."""
    tokenizer = Tokenizer(models.WordLevel(vocab=ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"'s|[A-Za-z0-9]+|[^\sA-Za-z0-9]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.decoder = decoders.WordPiece()  # spaces between words, none before "." and "'s"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
