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


@functools.cache
def _cpuinfo():
    """What Linux says of the CPU; elsewhere nothing."""
    try:
        return pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


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
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # another C library, which has its own way
