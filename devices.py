"""What each device computes best in, and what a CPU needs to be left alone by its allocator."""

import ctypes
import functools

import torch


def autocast_dtype(device):
    """The type to compute in: bfloat16 where the device multiplies it natively, float16 on older GPUs, else float32.

    device: a `torch.device`, or its name.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and _cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


@functools.cache
def _cpu_has_bfloat16():
    """Whether the CPU has bfloat16 dot products (AVX512-BF16, AMX); emulated ones are slower than float32."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            flags = next((line.split() for line in cpuinfo if line.startswith("flags")), [])
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


@functools.cache
def keep_freed_memory():
    """Tell glibc to reuse the memory of freed tensors; else it returns large ones, and every step zeroes new pages."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # another C library, which has its own way
