"""A Hydra launcher that runs the cells of a sweep in this process, from shared prefills."""
