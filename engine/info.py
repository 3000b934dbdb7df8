"""What an engine tells about itself: fixed facts and a snapshot of its counters."""

from dataclasses import dataclass

from engine.activation import ActivationMode, ActivationSupport
from engine.quality import MeasuredQuality


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about a loaded model and the engine around it; fixed after the start."""

    name: str
    adapter: str | None  # name of the folder of the merged adapter
    architecture: str
    vocab_size: int
    max_model_len: int
    dtype: str
    quantization: str  # of the weights: none, int8 or int4
    support: ActivationSupport
    quality: MeasuredQuality
    num_parameters: int
    weight_bytes: int
    weights_digest: str  # of a sample of the weights: another model, adapter, dtype or quantisation gives another one
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_kv_blocks: int
    block_size: int
    kv_cache_bytes: int
    threads: int
    device: str  # cpu, or the GPU's name
    kernels: dict[str, str]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and the present state of queue and cache.

    Attributes:
        running: Sequences in the running batch.
        waiting: Sequences that wait for admission.
        kv_blocks_used: Blocks held by live sequences.
        kv_blocks_cached: Blocks that nobody holds and whose content can be reused.
        prompt_tokens: Tokens of accepted prompts, one count per sample.
        step_seconds: Total duration of all steps.
        prefix_cache_queries: Tokens looked up in the prefix cache; `prefix_cache_hits` of them were there.
        ffn_zeros: By mode, a list over layers: elements of act(gate) that were exactly 0, of `ffn_elements`.
        ffn_rows: RELU token rows by feed-forward path.
        ffn_neurons: Neurons whose weights in `up` and `down` were "read" or "skipped", counted in each step and layer.
        ffn_flops: Operations that the feed-forward takes without skipping, by mode; RELU rows were spared
            `ffn_flops_skipped` of theirs.
        weight_bytes_read: Bytes of weights that steps read.
        negatives: Negative gate values in stochastic mode; `negatives_kept` of them went through SILU, and
            `negatives_expected` is what their requests' p would give on average.
        phase_seconds: Duration of all steps by `engine.step_clock.StepPhase`.
    """

    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_blocks_cached: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    preemptions: int
    aborted: int
    steps: int
    step_seconds: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    ffn_zeros: dict[ActivationMode, list[int]]
    ffn_elements: dict[ActivationMode, list[int]]
    ffn_rows: dict[str, int]
    ffn_neurons: dict[str, int]
    ffn_flops: dict[ActivationMode, int]
    ffn_flops_skipped: int
    weight_bytes_read: int
    negatives: int
    negatives_kept: int
    negatives_expected: float
    phase_seconds: dict[str, float]
