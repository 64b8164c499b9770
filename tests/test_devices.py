"""What suits a device: bfloat16 only on a CPU that multiplies it sooner than float32, channels_last but on Apple's."""

import devices

import pytest
import torch

import utils
from models import Model

AVX2 = "flags : fpu sse4_2 fma avx2"
AVX512_BF16 = f"{AVX2} avx512f avx512_bf16"
AMX = f"{AVX512_BF16} amx_bf16 amx_tile amx_int8"
CPUS = {  # as Linux describes them: the rates of matrix products measured there decide
    "Intel with AMX": (f"processor : 0\nvendor_id : GenuineIntel\n{AMX}", torch.bfloat16),
    "Intel with AVX512-BF16": (f"processor : 0\nvendor_id : GenuineIntel\n{AVX512_BF16}", torch.float32),
    "AMD with AVX512-BF16": (f"processor : 0\nvendor_id : AuthenticAMD\n{AVX512_BF16}", torch.bfloat16),
    "AMD without": (f"processor : 0\nvendor_id : AuthenticAMD\n{AVX2}", torch.float32),
    "Arm": ("processor : 0\nFeatures : fp asimd bf16", torch.float32),
    "not Linux": ("", torch.float32),
}


@pytest.mark.parametrize("cpu", CPUS)
def test_bfloat16_where_the_cpu_multiplies_it_sooner(cpu, monkeypatch):
    cpuinfo, dtype = CPUS[cpu]
    monkeypatch.setattr(devices, "_cpuinfo", lambda: cpuinfo)
    assert devices.autocast_dtype("cpu") == dtype


def test_cpuinfo_of_this_machine_or_none_elsewhere(monkeypatch):
    devices._cpuinfo.cache_clear()
    monkeypatch.setattr(devices.pathlib.Path, "read_text", lambda self: (_ for _ in ()).throw(FileNotFoundError()))
    assert devices._cpuinfo() == ""
    devices._cpuinfo.cache_clear()


def test_layout_of_images():
    layouts = {name: devices.memory_format(name) for name in ("cpu", "cuda", "mps")}
    assert layouts == {"cpu": torch.channels_last, "cuda": torch.channels_last, "mps": torch.contiguous_format}


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU")
def test_gradients_on_an_apple_gpu_are_those_of_the_cpu():
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    gradients = {}
    for device in ("cpu", "mps"):
        torch.manual_seed(0)
        model = Model(dropout_value=0).to(device)
        # A step of size one: what it changes is the gradient.
        before = [parameter.detach().cpu().clone() for parameter in model.parameters()]
        utils.train(model, device, [(images, labels)], utils.get_optimizer(model, lr=1.0, momentum=0), utils.get_loss())
        gradients[device] = [old - new.detach().cpu() for old, new in zip(before, model.parameters())]
    for cpu, mps in zip(*gradients.values()):
        assert (cpu - mps).norm() < 0.05 * cpu.norm() + 1e-4
