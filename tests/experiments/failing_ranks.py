"""Two ranks one of which fails: python failing_ranks.py HOW..., under torch's launcher. Run by test_ranks.py."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.longbench_qa import ranks


class Model:
    """Computes with the other ranks, or fails where it is told to."""

    def compute(self, how: str) -> None:
        with ranks.in_step():
            rank = distributed.get_rank()
            if how == "alike" or (how == "rank 0 before" and rank == 0) or (how == "rank 1 before" and rank == 1):
                raise ValueError("no room")
            total = torch.ones(1)
            distributed.all_reduce(total)  # as in the model's forward
            if how == "rank 1 after" and rank == 1:
                raise MemoryError("no room")
            if how == "differently":
                raise ValueError(f"no room on {rank}")


def main(hows: list[str]) -> None:
    ranks.ENDING = timedelta(seconds=3)
    with ranks.joined():
        if ranks.is_follower():
            model = Model()
            ranks.follow(lambda config: model)
            return
        for how in hows:
            try:
                ranks.lead("a config", "compute", how=how)
                Model().compute(how)
                print(f"{how}: done", flush=True)
            except Exception as error:
                print(f"{how}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
