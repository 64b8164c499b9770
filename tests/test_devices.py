"""What suits a device: bfloat16, the layout of images; and that an import asks no network."""

import itertools
import pathlib
import runpy
import subprocess
import sys

import pytest
import torch
from torch import nn

import devices
from models import Model

INTEL = "processor : 0\nvendor_id : GenuineIntel\nflags : fpu avx2 avx512f avx512_bf16"
CPUS = {  # as Linux describes them: the rates of matrix products measured there decide
    "Intel with AMX": (f"{INTEL} amx_bf16 amx_tile\n\nprocessor : 1", torch.bfloat16),
    "Intel with AVX512-BF16": (f"{INTEL}\n\nprocessor : 1", torch.float32),
    "AMD with AVX512-BF16": (INTEL.replace("GenuineIntel", "AuthenticAMD"), torch.bfloat16),
    "AMD without": ("processor : 0\nvendor_id : AuthenticAMD\nflags : fpu avx2", torch.float32),
    "not Linux": (None, torch.float32),
}


@pytest.mark.parametrize("described, expected", CPUS.values(), ids=CPUS)
def test_bfloat16_where_the_cpu_multiplies_it_sooner(described, expected, tmp_path, monkeypatch):
    read = pathlib.Path.read_text
    if described:
        (tmp_path / "cpuinfo").write_text(described)
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path, **_: read(tmp_path / path.name))
    assert runpy.run_path(devices.__file__)["autocast_dtype"]("cpu") == expected  # which has not looked yet


def test_channels_are_innermost_where_nothing_can_mind_it():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4))
    for model, name in itertools.product((Model(), plain), ("cpu", "cuda", "mps")):
        assert (devices.memory_format(model, torch.device(name)) == torch.channels_last) == (name != "mps")
    hooked, replaced = [Model() for _ in range(4)], Model()
    for model, kind in zip(hooked, ("forward", "forward_pre", "full_backward", "full_backward_pre")):
        getattr(model.C1[0].conv, f"register_{kind}_hook")(print)
    replaced.pool.forward = print
    derived = type("Derived", (Model,), {})()  # whose forward may be any, whatever that of its base is
    for model in (*hooked, replaced, nn.Sequential(nn.Conv2d(3, 4, 3), derived)):
        assert devices.memory_format(model, torch.device("cpu")) == torch.contiguous_format


def test_import_asks_no_network_and_warns_of_nothing():
    code = (
        "import socket, warnings; warnings.simplefilter('error')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = None\n"
        "import utils, numpy\n"
        "utils.get_train_transforms()(image=numpy.zeros((32, 32, 3), dtype='uint8'))\n"
    )
    folder = pathlib.Path(devices.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
