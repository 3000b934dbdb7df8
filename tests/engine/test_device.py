"""Which device an engine gets, and what it is told when it cannot have one."""

import subprocess
import sys

import pytest
import torch

from engine.config import EngineConfig
from engine.device import CPU, CUDA, choose_device, device_name
from engine.errors import InvalidConfig

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


def test_the_cpu_is_the_default() -> None:
    assert choose_device(EngineConfig()) == CPU
    assert device_name(CPU) == "cpu"


@without_gpu
def test_auto_takes_the_cpu_where_there_is_no_gpu(recwarn: pytest.WarningsRecorder) -> None:
    assert choose_device(EngineConfig(device="auto")) == CPU
    assert not recwarn.list


@with_gpu
def test_auto_takes_the_gpu() -> None:
    assert choose_device(EngineConfig(device="auto")) == choose_device(EngineConfig(device="cuda")) == CUDA


@without_gpu
def test_what_a_machine_lacks_for_cuda_is_said() -> None:
    missing = r"needs a build of PyTorch with CUDA" if torch.version.cuda is None else r"needs an NVIDIA GPU"
    with pytest.raises(InvalidConfig, match=f"device 'cuda' {missing}"):
        choose_device(EngineConfig(device="cuda"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8"}, "quantize must be 'none' on device 'cuda', got 'int8'"),
        ({"kernels": "reference"}, "kernels must be 'auto' or 'triton' on device 'cuda', got 'reference'"),
        ({"kernels": "vector"}, "kernels must be 'auto' or 'triton' on device 'cuda', got 'vector'"),
    ],
)
def test_what_does_not_run_on_cuda_is_refused_there_and_runs_on_the_cpu_otherwise(
    options: dict[str, str], message: str
) -> None:
    with pytest.raises(InvalidConfig, match=message):
        choose_device(EngineConfig(device="cuda", **options))
    assert choose_device(EngineConfig(device="auto", **options)) == CPU


@without_gpu
def test_triton_kernels_on_the_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_device(EngineConfig(kernels="triton")) == CPU

    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InvalidConfig, match="set TRITON_INTERPRET=1"):
        choose_device(EngineConfig(kernels="triton"))


def test_the_engine_imports_no_triton() -> None:
    code = (
        "import sys, engine, engine.runner; "
        "print([name for name in sys.modules if name == 'triton' or name.startswith('engine.kernels.triton')])"
    )

    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout == "[]\n"
    assert found.stderr == ""
