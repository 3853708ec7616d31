"""How worker processes start."""

import multiprocessing
from multiprocessing.context import BaseContext


def worker_context(num_workers: int) -> BaseContext | None:
    """Chooses how workers start.

    Workers are never forks of this process: the fork of one in which libraries have started threads can hang for ever.
    Where there are forks they come from a server that has this package's imports, elsewhere they are fresh processes. A
    script that trains therefore keeps what it runs under ``if __name__ == "__main__":``, as `multiprocessing` asks.

    Args:
        num_workers: Number of them.

    Returns:
        What a `DataLoader` or a pool starts them with; None without workers, as a `DataLoader` wants.
    """
    if not num_workers:
        return None
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["storm_vlm.data"])
    return context
