"""What each device computes best in, how its threads wait, and how to make glibc keep freed memory.

Import it before torch, whose OpenMP library reads how to wait only once.
"""

import ctypes
import functools
import os
import pathlib

# Threads that wait for each other spin, by default for so long that on some machines one other program on a core makes
# a step many times slower; benchmarks/speed.py measures it.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from torch import nn


def best_device():
    """An NVIDIA GPU if there is one, else an Apple GPU, else the CPU, as a `torch.device`."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def autocast_dtype(device):
    """The type to compute in: bfloat16 where it is faster, float16 on older NVIDIA GPUs, else float32.

    Args:
        device: a `torch.device`, or its name.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and _faster_in_bfloat16(_cpuinfo()):
        return torch.bfloat16
    return torch.float32


# The files of torch.nn.modules whose layers take images in any layout; those for volumes do not.
ANY_LAYOUT = ("activation", "batchnorm", "container", "conv", "dropout", "linear", "normalization", "pooling")


def memory_format(model, device):
    """The layout for the model's images: channels_last, which has the faster kernels, if nothing can mind it.

    A `view` of an activation fails in it, in a forward or in a hook. So no module may have hooks or a forward of its
    own, and each has to be a layer of torch or of a class that says `channels_last = True`. Not on Apple's GPUs, where
    it makes the gradients of batch normalisation wrong (pytorch issue 175189).
    """
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    if device.type == "mps" or any(getattr(nn.modules.module, f"_global{kind}") for kind in hooks):
        return torch.contiguous_format
    for module in model.modules():
        package, _, file = type(module).__module__.rpartition(".")
        of_torch = package == "torch.nn.modules" and file in ANY_LAYOUT and "3d" not in type(module).__name__
        known = of_torch or type(module) is nn.Flatten or vars(type(module)).get("channels_last")
        if not known or "forward" in vars(module) or any(getattr(module, kind) for kind in hooks):
            return torch.contiguous_format
    return torch.channels_last


@functools.cache
def _cpuinfo():
    """What Linux says of the CPU; elsewhere nothing."""
    try:
        return pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


@functools.cache
def _faster_in_bfloat16(cpuinfo):
    """Whether the first CPU of /proc/cpuinfo multiplies bfloat16 faster than float32.

    AMX does, and so does AVX512-BF16 on AMD. On Intel, AVX512-BF16 alone, as in virtual machines that hide AMX, has
    half the rate of float32.
    """
    facts = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.split())
    flags = facts.get("flags", [])
    return "amx_bf16" in flags or ("avx512_bf16" in flags and facts.get("vendor_id") == ["AuthenticAMD"])


@functools.cache
def keep_freed_memory():
    """Tell glibc to reuse the memory of freed tensors; else it returns large ones, and every step zeroes new pages."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_THRESHOLD, of which older versions take at most 2**25, and M_TRIM_THRESHOLD, which alone does harm.
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):
            libc.mallopt(-1, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # another C library, which has its own way
