"""Chooses the device that an engine computes on, and says what is missing for the one that is wanted."""

import importlib.util
import os
from functools import cache

import torch

from engine.config import Device, EngineConfig, KernelSet, Quantization
from engine.errors import InvalidConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# bfloat16 matrix instructions.
OLDEST_CAPABILITY = (8, 0)
INSTALL_TRITON = "pip install 'siluette[gpu]'"


def choose_device(config: EngineConfig) -> torch.device:
    """The device of an engine.

    Raises:
        InvalidConfig: The device that is asked for by name is not there, or what is asked for does not run on it. The
            message says what is missing.
    """
    problem = _options_problem(config) or _machine_problem()
    if config.device is Device.CUDA:
        if problem is not None:
            raise InvalidConfig(problem)
        return CUDA
    if config.device is Device.AUTO and problem is None:
        return CUDA
    if config.kernels is KernelSet.TRITON:
        _check_interpreter()
    return CPU


@cache
def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's name as its maker gives it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _options_problem(config: EngineConfig) -> str | None:
    """What of the configuration does not run on a GPU."""
    if config.quantize is not Quantization.NONE:
        return f"quantize must be 'none' on device 'cuda', got '{config.quantize}'"
    if config.kernels not in (KernelSet.AUTO, KernelSet.TRITON):
        return f"kernels must be 'auto' or 'triton' on device 'cuda', got '{config.kernels}'"
    return None


def _machine_problem() -> str | None:
    """What this machine lacks for device 'cuda'."""
    if torch.version.cuda is None:
        return f"device 'cuda' needs a build of PyTorch with CUDA; this one is {torch.__version__}, without"
    if not torch.cuda.is_available():
        return "device 'cuda' needs an NVIDIA GPU and its driver; PyTorch finds none on this machine"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        wanted, found = (".".join(map(str, version)) for version in (OLDEST_CAPABILITY, capability))
        return f"device 'cuda' needs compute capability {wanted} or newer; {device_name(CUDA)} has {found}"
    if importlib.util.find_spec("triton") is None:
        return f"device 'cuda' needs the package triton: {INSTALL_TRITON}"
    return None


def _check_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        raise InvalidConfig(f"kernels 'triton' need the package triton: {INSTALL_TRITON}")
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise InvalidConfig(
            "kernels 'triton' need device 'cuda'; on the CPU they run in Triton's interpreter only, which is for tests "
            "and very slow: set TRITON_INTERPRET=1"
        )
