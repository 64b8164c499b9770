"""A model inside its wrapper, and what the processes of a `torchrun` tell each other."""

import sys

import torch
from torch import distributed, nn


def unwrap(model):
    """The network inside `DataParallel`, `DistributedDataParallel` and `torch.compile`, in any order."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        else:
            return model


def _several():
    return distributed.is_available() and distributed.is_initialized()


def rank():
    """Number of this process, from 0."""
    return distributed.get_rank() if _several() else 0


def world_size():
    """Number of processes."""
    return distributed.get_world_size() if _several() else 1


def share():
    """(number of this process, number of processes) among which the loaders share out the images.

    Hugging Face's accelerate shares out whatever loader it is given, so the loader must then be of all images.
    """
    accelerate = sys.modules.get("accelerate.state")
    return (0, 1) if accelerate is not None and accelerate.is_initialized() else (rank(), world_size())


def sum_over_processes(values, device):
    """The numbers of a list, each summed over all processes, as a list of floats."""
    if world_size() == 1:
        return values
    device = device if distributed.get_backend() == "nccl" else "cpu"
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(totals)
    return totals.tolist()


def gather(value):
    """What each process has, in a list, the same in all of them."""
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def share_buffers(model):
    """Give all processes the running statistics of the first, whose weights are kept."""
    for buffer in model.buffers():
        distributed.broadcast(buffer, 0)
