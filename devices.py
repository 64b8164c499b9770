"""Devices, what they compute best in, and the processes that `torchrun` starts on several of them."""

import atexit
import contextlib
import ctypes
import os
import pathlib
import sys

import torch
from torch import distributed, nn


def best_device():
    """An NVIDIA GPU if there is one, else an Apple GPU, else the CPU, as a `torch.device`.

    A process of a `torchrun` joins the others, takes the GPU of its number, and is silent unless it is the first.
    """
    cuda = torch.cuda.is_available()
    if distributed.is_available() and distributed.is_torchelastic_launched() and not distributed.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if cuda and distributed.is_nccl_available() else "gloo")
        atexit.register(_leave_processes)
        if rank():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if cuda:
        return torch.device("cuda", torch.cuda.current_device())
    # Apple's GPU is a single one, which processes cannot share.
    return torch.device("mps" if torch.backends.mps.is_available() and world_size() == 1 else "cpu")


def autocast_dtype(device):
    """The type to compute in: bfloat16 where it is faster, float16 on older NVIDIA GPUs, else float32."""
    device, words = torch.device(device), []
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        with contextlib.suppress(OSError):  # not Linux
            words = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].split()
    # Intel's AVX512-BF16 without AMX has half the rate of float32.
    faster = "amx_bf16" in words or ("avx512_bf16" in words and "AuthenticAMD" in words)
    return torch.bfloat16 if faster else torch.float32


def memory_format(model, device):
    """The layout for the model's images: channels_last, which has the faster kernels, if nothing can mind it.

    A `view` of an activation fails in it, so each module has to be a layer of torch, or of a class that says
    `channels_last = True`, without hooks or a forward of its own.
    """
    own = ("forward", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for module in unwrap(model).modules():
        known = type(module).__module__.startswith("torch.nn.modules.") or vars(type(module)).get("channels_last")
        if not known or any(vars(module).get(name) for name in own):
            return torch.contiguous_format
    # On Apple's GPUs it makes the gradients of batch normalisation wrong (pytorch issue 175189).
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def keep_freed_memory():
    """Tell glibc to reuse the memory of freed tensors; else it returns large ones, and every step zeroes new pages."""
    with contextlib.suppress(OSError, AttributeError):  # of another C library, which has its own way
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_THRESHOLD, of which older versions take at most 2**25, and M_TRIM_THRESHOLD, which alone does harm.
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):
            libc.mallopt(-1, 2**31 - 1)


def unwrap(model):
    """The network inside `DataParallel`, `DistributedDataParallel` and `torch.compile`, in any order."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def _leave_processes():
    if distributed.is_initialized() and not hasattr(sys, "last_value"):  # after an error it would wait for the others
        distributed.destroy_process_group()


def world_size():
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank():
    """Number of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def gather(value):
    """What each process has, in a list, the same in all of them."""
    gathered = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(gathered, value)
    return gathered


def begin_epoch(model, loader):
    """Give all processes the weights and running statistics of the first, and one new order of the images."""
    if world_size() > 1:
        for value in unwrap(model).state_dict().values():
            distributed.broadcast(value, 0)
        if hasattr(sampler := getattr(loader, "sampler", None), "set_epoch"):
            sampler.set_epoch(gather(int(torch.randint(2**31, ())))[0])


def average_gradients(model):
    """Give all processes the mean of their gradients; after a `DistributedDataParallel` it changes nothing."""
    if world_size() > 1:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(total.view_as(gradient) / world_size())
