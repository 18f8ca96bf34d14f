"""Train the demo model: a small Llama that reads demo_qa's contexts and answers questions about them.

    python scripts/train_demo_model.py --output FOLDER                  # one H200
    python scripts/train_demo_model.py --output FOLDER --resume         # go on from FOLDER/checkpoint.pt

Data is drawn on the GPU (experiments/longbench_qa/demo_language.py), never held-out rows. Contexts grow when the share
of questions that the model answers passes a gate; shorter ones stay in the mix. The learning rate warms up, stays, and
decays over the last part of the steps. A training step is replayed as a CUDA graph, one for each shape.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from experiments.longbench_qa.demo_language import FAMILIES, draw, training_sequences
from experiments.longbench_qa.demo_text import PASSAGES, SENTENCES, demo_tokenizer
from experiments.longbench_qa.demo_words import BOS, EOS, PAD, WORDS

STAGES = ((1, 4), (1, 8), (2, 8), (4, 8), (7, 8), (14, 8), (30, 8), (60, 8))  # passages, sentences of each
TOKENS = (64, 96, 160, 300, 512, 1024, 2048, 4096)  # about what a row of the stage takes
QUESTIONS = 8  # of a context, where it has enough to ask about
SHARES = {"one_fact": 0.4, "two_hop": 0.25, "list": 0.15, "passage": 0.2}
LOG = ("step", "seconds", "stage", "family", "passages", "loss", "accuracy", "learning_rate")


@dataclass
class Recipe:
    steps: int = 20000
    batch_tokens: int = 32768
    peak_rate: float = 1e-3
    warmup: int = 300
    decay: float = 0.25  # of the steps, at the end
    gate: float = 0.85  # share of questions answered before contexts grow
    width: int = 256
    layers: int = 6
    checkpoint: int = 500  # steps between two
    seed: int = 0


def new_model(recipe: Recipe) -> PreTrainedModel:
    """In float32, with random weights."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=recipe.width,
        intermediate_size=recipe.width * 11 // 4,
        num_hidden_layers=recipe.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4608,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    torch.manual_seed(recipe.seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def rate_at(step: int, recipe: Recipe) -> float:
    """Learning rate: linear warm-up, constant, linear decay to 0."""
    left = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return recipe.peak_rate * min(1.0, (step + 1) / recipe.warmup, max(left, 0.0))


def loss_and_accuracy(
    model: PreTrainedModel, ids: Tensor, labels: Tensor, n_answers: int, n_labels: int
) -> tuple[Tensor, Tensor]:
    """Mean loss over what is to be learned, and the share of questions with every token of the answer right.

    ids and labels [B, N]; a row has `n_answers` questions with `n_labels` labels in all: known beforehand, since a CUDA
    graph cannot ask.
    """
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.is_cuda, cache_enabled=False):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        asked = labels != -100
        places = asked.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :n_labels].sort(1).values
        picked = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2]))
        logits = model.lm_head(picked).float()
    wanted = labels.gather(1, places)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    right = (logits.argmax(-1) == wanted).view(len(ids), n_answers, -1).all(-1)
    return loss, right.float().mean()


class Step:
    """A training step for one shape of batch, replayed as a CUDA graph from the second call on."""

    def __init__(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, pool: Any) -> None:
        self.model, self.optimizer, self.pool = model, optimizer, pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self, ids: Tensor, labels: Tensor, *counts: int) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if not ids.is_cuda or self.calls <= 2:
            return self._run(ids, labels, *counts)
        if self.graph is None:
            self.ids, self.labels = ids.clone(), labels.clone()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.pool):
                self.result = self._run(self.ids, self.labels, *counts)
        self.ids.copy_(ids)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.result

    def _run(self, ids: Tensor, labels: Tensor, *counts: int) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=False)
        loss, accuracy = loss_and_accuracy(self.model, ids, labels, *counts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        return loss.detach(), accuracy


def batch_of(
    seed: int, step: int, family: str, stage: int, n_rows: int, device: str
) -> tuple[Tensor, Tensor, int, int]:
    """ids, labels, and of a row the numbers of questions and of labels; the rows of a step are its own."""
    passages, sentences = STAGES[stage]
    rows = torch.arange(n_rows, device=device) + step * 2**20
    batch = draw(seed, rows, family, passages, sentences, QUESTIONS)
    ids, labels = training_sequences(batch)
    n_answers, length = batch.answers.shape[1:]
    return ids, labels, n_answers, n_answers * (length + 1)


def train(recipe: Recipe, folder: Path, device: str, resume: bool, report: Callable[[str], None] = print) -> None:
    """Train to the last step; FOLDER gets checkpoint.pt, log.csv and, at the end, the model."""
    model = new_model(recipe).to(device)
    on_gpu = device == "cuda"
    rate = torch.tensor(0.0, device=device) if on_gpu else 0.0  # a graph reads it anew in each step
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=on_gpu, capturable=on_gpu
    )
    first, stage, best = 0, 0, {family: 0.0 for family in FAMILIES}
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    if resume:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, stage, best = saved["step"], saved["stage"], saved["best"]
    steps: dict[tuple[str, int], Step] = {}
    pool = torch.cuda.graph_pool_handle() if on_gpu else None
    choices = torch.Generator().manual_seed(recipe.seed)
    started = time.perf_counter()
    with (folder / "log.csv").open("a" if resume else "w", newline="") as file:
        log = csv.writer(file, lineterminator="\n")
        if not resume:
            log.writerow(LOG)
        for step in range(recipe.steps):
            chance, back = torch.rand(2, generator=choices).tolist()
            if step < first:
                continue
            family = _pick(chance)
            # Three in four batches of the longest contexts so far; the others anything up to them.
            at = stage if back < 0.75 else int((back - 0.75) * 4 * (stage + 1))
            n_rows = max(1, recipe.batch_tokens // TOKENS[at])
            batch = batch_of(recipe.seed + 1, step, family, at, n_rows, device)
            for group in optimizer.param_groups:
                if on_gpu:
                    group["lr"].fill_(rate_at(step, recipe))
                else:
                    group["lr"] = rate_at(step, recipe)
            run = steps.setdefault((family, at), Step(model, optimizer, pool))
            loss, accuracy = run(*batch)
            if step % 20 == 0:
                now = float(accuracy)
                if at == stage:
                    best[family] += 0.3 * (now - best[family])
                seconds = time.perf_counter() - started
                log.writerow((step, f"{seconds:.1f}", stage, family, STAGES[at][0], f"{float(loss):.4f}", f"{now:.4f}",
                              f"{rate_at(step, recipe):.2e}"))  # fmt: skip
                file.flush()
                if best["one_fact"] > recipe.gate and stage + 1 < len(STAGES):
                    report(f"step {step}, {seconds:.0f} s: contexts of {STAGES[stage]} learned, {_shares(best)}")
                    stage, best = stage + 1, {family: 0.0 for family in FAMILIES}
            if (step + 1) % recipe.checkpoint == 0 or step + 1 == recipe.steps:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state | {"stage": stage, "best": best, "recipe": asdict(recipe)}, checkpoint)
                report(f"step {step}, {time.perf_counter() - started:.0f} s: stage {stage}, {_shares(best)}")
    model.to(torch.bfloat16).save_pretrained(folder)
    demo_tokenizer().save_pretrained(folder)
    evaluate(model, folder / "evaluation.csv", device, report)


@torch.no_grad()
def evaluate(model: PreTrainedModel, path: Path, device: str, report: Callable[[str], None], n_rows: int = 200) -> None:
    """Share of held-out questions whose every answer token comes out right, by family and length; a row each."""
    model.eval()
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("family", "tokens", "rows", "accuracy"))
        for family in FAMILIES:
            shares = []
            for length, passages in PASSAGES.items():
                right = []
                for some in torch.arange(n_rows, device=device).split(max(1, 65536 // length)):
                    batch = draw(0, some, family, passages, SENTENCES, held_out=True)
                    ids, labels = training_sequences(batch)
                    n_labels = batch.answers.shape[2] + 1
                    right += [loss_and_accuracy(model, ids, labels, 1, n_labels)[1].item() * len(some)]
                shares.append(f"{sum(right) / n_rows:.3f} at {length}")
                table.writerow((family, length, n_rows, sum(right) / n_rows))
            report(f"held out, {family}: {', '.join(shares)}")


def _pick(chance: float) -> str:
    for family, share in SHARES.items():
        chance -= share
        if chance < 0:
            return family
    return FAMILIES[0]


def _shares(best: dict[str, float]) -> str:
    return ", ".join(f"{family} {share:.2f}" for family, share in best.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    folder, resume, device = options.pop("output"), options.pop("resume"), options.pop("device")
    train(Recipe(**options), folder, device, resume)
    return 0


if __name__ == "__main__":
    sys.exit(main())
