"""How many cells a process can have open at once, by its limit of open files."""

import resource

FILES_PER_CELL = 3  # in this process a lock file and wandb's connection; in wandb's own, of the same limit, three files
MOST_FILES = 2**16  # asked for where the system sets no limit


def cells_at_a_time() -> int:
    """Raise this process's limit of open files as far as it may, and return how many cells fit into half of it.

    The other half is for the model, the GPU and whatever else is open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        soft = MOST_FILES
    allowed = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(1, max(soft, allowed) // 2 // FILES_PER_CELL)
