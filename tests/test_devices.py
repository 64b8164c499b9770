"""What suits a device: bfloat16, the layout of images; and that an import asks no network."""

import pathlib
import subprocess
import sys

import pytest
import torch
from torch import nn

import devices
from models import Model

AVX2 = "flags : fpu sse4_2 fma avx2"
AVX512_BF16 = f"{AVX2} avx512f avx512_bf16"
CPUS = {  # as Linux describes them: the rates of matrix products measured there decide
    "Intel with AMX": (f"processor : 0\nvendor_id : GenuineIntel\n{AVX512_BF16} amx_bf16 amx_tile amx_int8", True),
    "Intel with AVX512-BF16": (f"processor : 0\nvendor_id : GenuineIntel\n{AVX512_BF16}", False),
    "AMD with AVX512-BF16": (f"processor : 0\nvendor_id : AuthenticAMD\n{AVX512_BF16}", True),
    "AMD without": (f"processor : 0\nvendor_id : AuthenticAMD\n{AVX2}", False),
}


@pytest.mark.parametrize("cpu", CPUS)
def test_bfloat16_where_the_cpu_multiplies_it_sooner(cpu, tmp_path):
    described, faster = CPUS[cpu]
    (tmp_path / "cpuinfo").write_text(described + "\n\nprocessor : 1")
    assert devices._faster_in_bfloat16(tmp_path / "cpuinfo") == faster
    assert devices.autocast_dtype("cpu") in (torch.bfloat16, torch.float32)


def test_float32_where_nothing_describes_the_cpu(tmp_path):
    assert not devices._faster_in_bfloat16(tmp_path / "absent")


def changed(change):
    model = Model()
    change(model)
    return model


class Derived(Model):
    """Its forward may be any, whatever that of its base is."""


class Marked(nn.Module):
    channels_last = True


def nothing(*_):
    pass


LAYOUTS = {
    "Model": (Model(), True),
    "torch's layers": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4)), True),
    "a class that says so": (Marked(), True),
    "a class that does not": (Derived(), False),
    "such a class inside": (nn.Sequential(nn.Conv2d(3, 4, 3), Derived()), False),
    "volumes": (nn.Sequential(nn.MaxPool3d((3, 1, 1)), nn.Conv2d(1, 4, 3)), False),
    "forward hook": (changed(lambda m: m.C1[0].conv.register_forward_hook(nothing)), False),
    "backward hook": (changed(lambda m: m.C1[0].conv.register_full_backward_hook(nothing)), False),
    "backward pre-hook": (changed(lambda m: m.C1[0].conv.register_full_backward_pre_hook(nothing)), False),
    "a forward replaced": (changed(lambda m: setattr(m.pool, "forward", nothing)), False),
    "parametrized": (changed(lambda m: nn.utils.parametrizations.weight_norm(m.classifier)), False),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout_of_images(case):
    model, channels_last = LAYOUTS[case]
    expected = torch.channels_last if channels_last else torch.contiguous_format
    assert [devices.memory_format(model, torch.device(name)) for name in ("cpu", "cuda")] == [expected] * 2
    assert devices.memory_format(model, torch.device("mps")) == torch.contiguous_format


def test_a_hook_of_all_modules_counts_too():
    hook = nn.modules.module.register_module_forward_hook(nothing)
    try:
        assert devices.memory_format(Model(), torch.device("cpu")) == torch.contiguous_format
    finally:
        hook.remove()


FOLDER = pathlib.Path(devices.__file__).parent


def test_import_asks_no_network_and_warns_of_nothing():
    code = (
        "import socket, warnings; warnings.simplefilter('error')\n"
        "def refuse(*a, **k): raise AssertionError('network used at import')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import utils, numpy\n"
        "utils.get_train_transforms()(image=numpy.zeros((32, 32, 3), dtype='uint8'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
