"""How a command ends that torchrun or accelerate started in several processes."""

import gc


def leave_process_group() -> None:
    """Frees what communicates, then leaves the group of processes; nothing happens in a process of its own.

    Gloo's threads may hold tensors a little longer than their collectives last, and one that frees them while the
    interpreter ends aborts the process after all its work is done (pytorch/pytorch#179291). They get their turn here.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()
