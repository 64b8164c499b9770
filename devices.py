"""What each device computes best in, and how to make glibc keep freed memory."""

import ctypes
import functools
import pathlib

import torch

from parallel import join_processes, world_size


def best_device():
    """An NVIDIA GPU if there is one, else an Apple GPU, else the CPU, as a `torch.device`.

    In a process that `torchrun` has started it joins the others, and takes the GPU of its number.
    """
    join_processes()
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    # Apple's GPU is a single one, which processes cannot share.
    return torch.device("mps" if torch.backends.mps.is_available() and world_size() == 1 else "cpu")


def autocast_dtype(device):
    """The type to compute in: bfloat16 where it is faster, float16 on older NVIDIA GPUs, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and _faster_in_bfloat16() else torch.float32


@functools.cache
def _faster_in_bfloat16(cpuinfo="/proc/cpuinfo"):
    """Whether the CPU that Linux describes multiplies bfloat16 faster than float32.

    AMX does, and so does AVX512-BF16 on AMD. On Intel, AVX512-BF16 alone, as in virtual machines that hide AMX, has
    half the rate of float32.
    """
    try:
        words = pathlib.Path(cpuinfo).read_text().split("\n\n")[0].split()
    except OSError:  # not Linux
        return False
    return "amx_bf16" in words or ("avx512_bf16" in words and "AuthenticAMD" in words)


def memory_format(model, device):
    """The layout for the model's images: channels_last, which has the faster kernels, if nothing can mind it.

    A `view` of an activation fails in it, in a forward or in a hook. So each module has to be a layer of torch or of a
    class that says `channels_last = True`, without hooks or a forward of its own. Not on Apple's GPUs, where it makes
    the gradients of batch normalisation wrong (pytorch issue 175189).
    """
    own = ("forward", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for module in model.modules():
        known = type(module).__module__.startswith("torch.nn.modules.") or vars(type(module)).get("channels_last")
        if not known or any(vars(module).get(name) for name in own):
            return torch.contiguous_format
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


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
