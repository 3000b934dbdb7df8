"""Configuration of one engine."""

from dataclasses import dataclass
from enum import StrEnum

from engine.errors import InvalidConfig


class FfnPath(StrEnum):
    """Which feed-forward path RELU rows take."""

    AUTO = "auto"  # from measured costs
    SPARSE = "sparse"
    DENSE = "dense"


class DType(StrEnum):
    """Type of weights, activations and KV cache."""

    AUTO = "auto"  # bfloat16: half the bytes to read, and vector loops widen it on the way
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Device(StrEnum):
    """What computes."""

    AUTO = "auto"  # a GPU if there is one that can, else the CPU
    CPU = "cpu"
    CUDA = "cuda"


class Quantization(StrEnum):
    """Bits of the weights in memory."""

    NONE = "none"  # as `dtype` says
    INT8 = "int8"
    INT4 = "int4"  # 4 bits; 8 for the feed-forward's `down` and the output matrix, which suffer most


class KernelSet(StrEnum):
    """Which kernels run the model."""

    AUTO = "auto"  # the fastest of the device
    VECTOR = "vector"  # without the matrix units of the processor (AMX)
    REFERENCE = "reference"  # plain PyTorch: slow, for comparison
    TRITON = "triton"  # those of the GPU; on the CPU in Triton's interpreter, for tests


_ENUMS: dict[str, type[StrEnum]] = {
    "dtype": DType,
    "quantize": Quantization,
    "device": Device,
    "ffn_path": FfnPath,
    "kernels": KernelSet,
}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine is built from. Defaults serve the default model on a laptop.

    Attributes:
        model: Hugging Face folder or name, or GGUF file; None is the default model.
        adapter: Folder of a PEFT LoRA adapter that is merged at load. None is the one that comes with the default
            model, and nothing for other models; "none" is nothing.
        quantize: Bits of the weights; token rows then meet them as integers of 15 bits.
        device: What computes.
        max_model_len: Longest sequence (prompt and output); None is the model's own, capped by the KV cache.
        max_num_seqs: Most sequences in the running batch.
        max_num_batched_tokens: Most tokens in one step; longer prompts run in chunks of what decoding leaves.
        max_waiting: Most sequences that may wait; one more is refused as overload.
        kv_cache_mib: Size of the KV-cache pool in MiB; reserved at start, used memory grows with the load.
        prefix_caching: Reuse keys and values of a common beginning.
        ffn_path: Path of RELU rows.
        allow_untuned_activations: Accept activations that the checkpoint was not tuned for.
        kernels: Which kernels run the model.
        threads: Compute threads; None is one per core.
        pin_threads: Give each compute thread of an `AsyncEngine` a core of its own, if there are as many as cores. An
            `LLM` computes in its caller's thread, which is left alone.

    Raises:
        InvalidConfig: `dtype`, `quantize`, `device`, `ffn_path` or `kernels` is not one of its values.
    """

    model: str | None = None
    adapter: str | None = None
    dtype: DType = DType.AUTO
    quantize: Quantization = Quantization.NONE
    device: Device = Device.CPU  # until the kernels for GPUs have run on one
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_waiting: int = 1024
    kv_cache_mib: int = 1024
    prefix_caching: bool = True
    ffn_path: FfnPath = FfnPath.AUTO
    allow_untuned_activations: bool = False
    kernels: KernelSet = KernelSet.AUTO
    threads: int | None = None
    pin_threads: bool = True

    def __post_init__(self) -> None:
        # Plain strings are welcome, as in `Activation`; left as they are, comparisons with `is` would not know them.
        for name, kind in _ENUMS.items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, kind(value))
            except ValueError:
                allowed = ", ".join(f"'{item}'" for item in kind)
                raise InvalidConfig(f"{name} must be one of {allowed}, got {value!r}") from None
