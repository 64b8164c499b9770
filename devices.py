"""What each device computes best in, and what a CPU needs to be left alone by its allocator."""

import ctypes
import functools
import pathlib

import torch


def autocast_dtype(device):
    """The type to compute in: bfloat16 where the device multiplies it sooner, float16 on older GPUs, else float32.

    device: a `torch.device`, or its name.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and _faster_in_bfloat16(_cpuinfo()):
        return torch.bfloat16
    return torch.float32


def memory_format(device):
    """The layout to keep images and convolutions in: channels_last, which has the faster kernels.

    But not on Apple's GPUs, where the gradients of batch normalisation are wrong in it (pytorch issue 175189).

    device: a `torch.device`, or its name.
    """
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


@functools.cache
def _cpuinfo():
    """What Linux says of the CPU; elsewhere nothing."""
    try:
        return pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


@functools.cache
def _faster_in_bfloat16(cpuinfo):
    """Whether the first CPU of /proc/cpuinfo multiplies bfloat16 sooner than float32.

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
