"""A model inside its wrapper, and what the processes of a `torchrun` tell each other."""

import atexit
import os
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


def join_processes():
    """Join the other processes, if `torchrun` has started this one; all but the first are silent from now on."""
    if not distributed.is_available() or not distributed.is_torchelastic_launched() or distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo")
    atexit.register(_leave_processes)
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def _leave_processes():
    if distributed.is_initialized() and not hasattr(sys, "last_value"):  # after an error it would wait for the others
        distributed.destroy_process_group()


def _several():
    return distributed.is_available() and distributed.is_initialized()


def rank():
    """Number of this process, from 0."""
    return distributed.get_rank() if _several() else 0


def world_size():
    """Number of processes."""
    return distributed.get_world_size() if _several() else 1


def gather(value):
    """What each process has, in a list, the same in all of them."""
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def begin_epoch(model, loader):
    """Give all processes the weights and running statistics of the first, and one new order of the images."""
    if world_size() == 1:
        return
    for value in unwrap(model).state_dict().values():
        distributed.broadcast(value, 0)
    if hasattr(sampler := getattr(loader, "sampler", None), "set_epoch"):
        sampler.set_epoch(gather(int(torch.randint(2**31, ())))[0])


def average_gradients(model):
    """Give all processes the mean of their gradients; after a `DistributedDataParallel` it changes nothing."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))
