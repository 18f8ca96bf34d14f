"""Train the demo model: a small Llama that reads demo_qa's contexts and answers questions about them.

    python scripts/train_demo_model.py --output FOLDER                  # one H200
    python scripts/train_demo_model.py --output FOLDER --resume         # go on from FOLDER/checkpoint.pt

Data is drawn on the GPU (experiments/longbench_qa/demo/language.py), never held-out rows. Contexts grow when the share
of questions that the model answers passes a gate; shorter ones stay in the mix. The learning rate warms up, stays, and
decays over the last part of the steps. A training step, data and all, is replayed as a CUDA graph, one for each shape.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
from demo_trainee import Trainee, losses_and_accuracy
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from experiments.longbench_qa.demo.language import FAMILIES, Contexts, Exercise, exercise
from experiments.longbench_qa.demo.rows import PASSAGES, SENTENCES
from experiments.longbench_qa.demo.tokenizer import demo_tokenizer
from experiments.longbench_qa.demo.words import BOS, EOS, PAD, WORDS

STAGES = ((1, 4), (2, 4), (4, 4), (4, 8), (7, 8), (14, 8), (30, 8), (60, 8))  # passages, sentences of each
QUESTIONS = (1, 1, 2, 3, 4, 6, 8, 8)  # of a context in each stage
POINTED_STAGES = 5  # the shortest contexts, in which attention is told where to look
LOG = ("step", "seconds", "family", "sentences", "loss_answers", "loss_reading", "loss_pointing", "accuracy", "rate")


@dataclass
class Recipe:
    steps: int = 16000
    batch_tokens: int = 32768
    peak_rate: float = 1e-3
    warmup: int = 300
    decay: float = 0.25  # of the steps, at the end
    gate: float = 0.85  # share of questions answered before contexts grow
    patience: int = 1500  # steps after which they grow all the same
    reading_weight: float = 0.5
    pointing_weight: float = 0.3
    width: int = 256
    layers: int = 4
    head_dim: int = 64
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
        head_dim=recipe.head_dim,
        initializer_range=0.02,
        max_position_embeddings=4608,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
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


def exercise_of(seed: int, rows: Tensor, stage: int, family: str) -> Exercise:
    """Questions of one family after contexts of a stage."""
    return exercise(Contexts(seed, rows, *STAGES[stage]), family, QUESTIONS[stage])


class Step:
    """A training step for one stage and family, drawing its data; replayed as a CUDA graph from the third call on."""

    def __init__(
        self, trainee: Trainee, optimizer: torch.optim.Optimizer, recipe: Recipe, stage: int, family: str, pool: Any
    ) -> None:
        self.trainee, self.optimizer, self.pool = trainee, optimizer, pool
        device = trainee.readers.weight.device
        self.weights = torch.tensor(
            [1.0, recipe.reading_weight, recipe.pointing_weight * (stage < POINTED_STAGES)], device=device
        )
        self.draw = partial(exercise_of, recipe.seed + 1, stage=stage, family=family)
        length = self.draw(torch.arange(1)).ids.shape[1]
        self.rows = torch.arange(max(1, recipe.batch_tokens // length), device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self, number: int) -> tuple[Tensor, Tensor]:
        """Loss and accuracy on the rows of step `number`, which are its own."""
        self.rows.copy_(torch.arange(len(self.rows), device=self.rows.device) + number * 2**20)
        self.calls += 1
        if not self.rows.is_cuda or self.calls <= 2:
            return self._run()
        if self.graph is None:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.pool):
                self.result = self._run()
        self.graph.replay()
        return self.result

    def _run(self) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=False)
        losses, accuracy = losses_and_accuracy(self.trainee, self.draw(self.rows))
        (losses * self.weights).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.trainee.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        return losses.detach(), accuracy


def train(recipe: Recipe, folder: Path, device: str, resume: bool, report: Callable[[str], None] = print) -> None:
    """Train to the last step; FOLDER gets checkpoint.pt, log.csv and, at the end, the model."""
    trainee = Trainee(new_model(recipe)).to(device)
    model = trainee.model
    on_gpu = device == "cuda"
    rate = torch.tensor(0.0, device=device) if on_gpu else 0.0  # a graph reads it anew in each step
    optimizer = torch.optim.AdamW(
        trainee.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=on_gpu, capturable=on_gpu
    )
    first, stage, entered, best = 0, 0, 0, dict.fromkeys(FAMILIES, 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    if resume:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        trainee.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, stage, entered, best = (saved[name] for name in ("step", "stage", "entered", "best"))
    if on_gpu:
        for layer in model.model.layers:
            layer.compile()
    steps: dict[tuple[int, str], Step] = {}
    pool = torch.cuda.graph_pool_handle() if on_gpu else None
    choices = torch.Generator().manual_seed(recipe.seed)
    started = time.perf_counter()
    with (folder / "log.csv").open("a" if resume else "w", newline="") as file:
        log = csv.writer(file, lineterminator="\n")
        if not resume:
            log.writerow(LOG)
        for number in range(recipe.steps):
            back = torch.rand(1, generator=choices).item()
            if number < first:
                continue
            # Three in four batches of the longest contexts so far; the others anything up to them.
            at = stage if back < 0.75 else int((back - 0.75) * 4 * (stage + 1))
            family = FAMILIES[number % len(FAMILIES)]
            for group in optimizer.param_groups:
                if on_gpu:
                    group["lr"].fill_(rate_at(number, recipe))
                else:
                    group["lr"] = rate_at(number, recipe)
            if (at, family) not in steps:
                steps[at, family] = Step(trainee, optimizer, recipe, at, family, pool)
            losses, accuracy = steps[at, family](number)
            if number % 11 == 0:  # no multiple of the families: each is logged
                now = accuracy.item()
                if at == stage:
                    best[family] += 0.5 * (now - best[family])
                seconds = time.perf_counter() - started
                figures = (*losses.tolist(), now, rate_at(number, recipe))
                sentences = STAGES[at][0] * STAGES[at][1]
                log.writerow((number, round(seconds, 1), family, sentences, *(f"{figure:.5g}" for figure in figures)))
                file.flush()
                learned = sum(best.values()) / len(best) > recipe.gate
                if (learned or number - entered > recipe.patience) and stage + 1 < len(STAGES):
                    report(f"step {number}, {seconds:.0f} s: contexts of {STAGES[stage]} learned, {_shares(best)}")
                    stage, entered, best = stage + 1, number, dict.fromkeys(FAMILIES, 0.0)
            if (number + 1) % recipe.checkpoint == 0 or number + 1 == recipe.steps:
                state = {"model": trainee.state_dict(), "optimizer": optimizer.state_dict(), "step": number + 1}
                torch.save(
                    state | {"stage": stage, "entered": entered, "best": best, "recipe": asdict(recipe)}, checkpoint
                )
                report(f"step {number}, {time.perf_counter() - started:.0f} s: stage {stage}, {_shares(best)}")
    trainee.to(torch.bfloat16)
    model.save_pretrained(folder)
    demo_tokenizer().save_pretrained(folder)
    evaluate(trainee, folder / "evaluation.csv", device, report)


@torch.no_grad()
def evaluate(trainee: Trainee, path: Path, device: str, report: Callable[[str], None], n_rows: int = 200) -> None:
    """Share of held-out questions whose every answer token comes out right, by family and length; a row each."""
    trainee.eval()
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("family", "tokens", "rows", "accuracy"))
        for family in FAMILIES:
            shares = []
            for length, passages in PASSAGES.items():
                right = 0.0
                for some in torch.arange(n_rows, device=device).split(max(1, 65536 // length)):
                    batch = exercise(Contexts(0, some, passages, SENTENCES, held_out=True), family, 1)
                    right += losses_and_accuracy(trainee, batch)[1].item() * len(some)
                shares.append(f"{right / n_rows:.3f} at {length}")
                table.writerow((family, length, n_rows, right / n_rows))
            report(f"held out, {family}: {', '.join(shares)}")


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
