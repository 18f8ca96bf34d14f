"""Run cells of the study: python experiments/longbench_qa/runner.py [overrides]. See conf/ for what there is."""

import sys
from pathlib import Path

# Another installed package may be named `experiments`: this repository's comes first. Hydra finds the launcher of
# sweeps, in `hydra_plugins`, the same way.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.longbench_qa.config import build_cell
from experiments.longbench_qa.in_process import run_together, summarise
from experiments.longbench_qa.schema import register_schema

register_schema()


@hydra.main(config_path="../../conf", config_name="config", version_base="1.3")
def main(config: DictConfig) -> None:
    """Translate a composed config into a cell and run it.

    A sweep comes here only under another launcher than `shared_prefill`, which runs its cells itself.
    """
    job = HydraConfig.get()
    in_sweep = job.mode == RunMode.MULTIRUN
    try:
        [result] = run_together({job.job.num if in_sweep else 0: build_cell(config)}).values()
        if isinstance(result, Exception):
            raise result
    except Exception as error:
        if in_sweep:
            # The other cells go on. Hydra itself reports no more than the first failure, at the very end.
            print(f"error: the cell [{job.job.override_dirname}] failed: {error}", file=sys.stderr)
            raise
        if not isinstance(error, ValueError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    finally:
        summarise()
