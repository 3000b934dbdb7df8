"""Options that several commands share, as annotated types.

An option that is not given is None and is not passed on, so that defaults stand in `engine.EngineConfig`,
`engine.SamplingParams` and `server.settings.ServerSettings` alone (or in the environment, for the latter). Importing
these here would load torch, and `siluette --help` would take seconds; so the help repeats the defaults as text, and
tests compare them with the code.
"""

from typing import Annotated, Literal

import typer

MODEL, SAMPLING, ACTIVATION = "Model and engine", "Sampling", "Activation"

DTypeName = Literal["auto", "float32", "bfloat16"]
FfnPathName = Literal["auto", "sparse", "dense"]
KernelsName = Literal["auto", "vector", "reference", "triton"]
DeviceName = Literal["auto", "cpu", "cuda"]
QuantizationName = Literal["none", "int8", "int4"]
ModeName = Literal["silu", "stochastic", "relu"]
ScopeName = Literal["all", "decode"]
LogLevelName = Literal["critical", "error", "warning", "info", "debug"]

Model = Annotated[
    str | None,
    typer.Argument(help="Hugging Face folder or name, or GGUF file.", show_default="SmolLM2-135M-Instruct"),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Hugging Face folder or name, or GGUF file.",
        show_default="SmolLM2-135M-Instruct",
        rich_help_panel=MODEL,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="Folder of a PEFT LoRA adapter that is merged at load; 'none' for no adapter.",
        show_default="the default model's own",
        rich_help_panel=MODEL,
    ),
]
DTypeOption = Annotated[
    DTypeName | None,
    typer.Option(
        help="Type of weights and KV cache; auto is bfloat16.",
        show_default="auto",
        rich_help_panel=MODEL,
    ),
]
Quantize = Annotated[
    QuantizationName | None,
    typer.Option(
        help="Bits of the weights: int8 is as good as bfloat16, int4 a little worse; both read less memory.",
        show_default="none",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    DeviceName | None,
    typer.Option(
        help="What computes; cuda is an NVIDIA GPU (needs siluette[gpu]), auto takes it if there is one.",
        show_default="cpu",
        rich_help_panel=MODEL,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Longest sequence, prompt and output together.",
        show_default="the model's own, capped by the KV cache",
        rich_help_panel=MODEL,
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(min=1, help="Most sequences in the running batch.", show_default="64", rich_help_panel=MODEL),
]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Most tokens in one step; longer prompts run in chunks.",
        show_default="512",
        rich_help_panel=MODEL,
    ),
]
MaxWaiting = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Most sequences that may wait; one more is answered with 429.",
        show_default="1024",
        rich_help_panel=MODEL,
    ),
]
KvCacheMib = Annotated[
    int | None,
    typer.Option(min=1, help="Size of the KV cache in MiB.", show_default="1024", rich_help_panel=MODEL),
]
PrefixCaching = Annotated[
    bool | None,
    typer.Option(
        "--prefix-caching/--no-prefix-caching",
        help="Reuse keys and values of a common beginning.",
        show_default="prefix-caching",
        rich_help_panel=MODEL,
    ),
]
FfnPathOption = Annotated[
    FfnPathName | None,
    typer.Option(
        help="Whether RELU tokens skip their zeros; auto decides step by step from measured costs. Same results.",
        show_default="auto",
        rich_help_panel=MODEL,
    ),
]
KernelsOption = Annotated[
    KernelsName | None,
    typer.Option(
        help="auto takes the fastest of the device, vector leaves out AMX; reference is plain PyTorch, slow, for "
        "comparison; triton are those of the GPU, on a CPU for tests only.",
        show_default="auto",
        rich_help_panel=MODEL,
    ),
]
AllowUntuned = Annotated[
    bool | None,
    typer.Option(
        "--allow-untuned-activations",
        help="Accept activations that the checkpoint was not tuned for.",
        rich_help_panel=MODEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Compute threads.", show_default="one per core", rich_help_panel=MODEL),
]
PinThreads = Annotated[
    bool | None,
    typer.Option(
        "--pin-threads/--no-pin-threads",
        help="Give each compute thread a core of its own, if there are as many as cores.",
        show_default="pin-threads",
        rich_help_panel=MODEL,
    ),
]

Mode = Annotated[
    ModeName | None,
    typer.Option(
        help="silu is deterministic, stochastic draws for each negative gate value, relu is sparse.",
        show_default="silu",
        rich_help_panel=ACTIVATION,
    ),
]
P = Annotated[
    float | None,
    typer.Option(
        "-p",
        "--p",
        help="Probability of SILU for a negative gate value, in [0, 1]; stochastic mode only.",
        show_default="0.8",
        rich_help_panel=ACTIVATION,
    ),
]
ScopeOption = Annotated[
    ScopeName | None,
    typer.Option(
        help="all tokens, or decode: generated tokens only, so that samples share the prompt's keys and values.",
        show_default="all",
        rich_help_panel=ACTIVATION,
    ),
]
ActivationSeed = Annotated[
    int | None,
    typer.Option(
        help="64-bit seed of the activation's draws; stochastic mode only.",
        show_default="--seed",
        rich_help_panel=ACTIVATION,
    ),
]

N = Annotated[
    int | None,
    typer.Option("-n", "--n", help="Number of samples, 1 to 128.", show_default="1", rich_help_panel=SAMPLING),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="Divides the logits, in [0, 10]; 0 is greedy decoding.", show_default="1.0", rich_help_panel=SAMPLING
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Keep the smallest set of tokens whose probability reaches this, in (0, 1].",
        show_default="1.0",
        rich_help_panel=SAMPLING,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Keep this many most likely tokens; 0 keeps all.", show_default="0", rich_help_panel=SAMPLING),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Keep tokens at least this many times as likely as the most likely one, in [0, 1].",
        show_default="0.0",
        rich_help_panel=SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        help="Divides positive and multiplies negative logits of tokens in prompt or output, in (0, 10].",
        show_default="1.0",
        rich_help_panel=SAMPLING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help="64-bit seed of the token draws.", show_default="random", rich_help_panel=SAMPLING),
]
MaxTokens = Annotated[int, typer.Option(help="At most this many tokens for each sample.", rich_help_panel=SAMPLING)]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="String that ends the text; may be given several times.", rich_help_panel=SAMPLING),
]
IgnoreEos = Annotated[
    bool | None,
    typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.", rich_help_panel=SAMPLING),
]
