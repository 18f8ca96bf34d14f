"""Hydra launchers that run the groups of a sweep as jobs: of Slurm, or side by side on this machine."""
