"""The peers: how each is started, and in which form it wants its requests."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.peers_models import ModelFiles
from bench.peers_setup import interpreter

OWN_ENVIRONMENT = "siluette"  # not among `peers_setup.ENVIRONMENTS`: the interpreter that runs the benchmark
HOST = "127.0.0.1"
NAME_OF_MODEL = "default-model"
KV_CACHE_GIB = 2  # of vLLM and `transformers serve`, whose own default is most of the machine's memory
KV_BLOCKS = 364  # of `transformers serve`, 256 tokens each: as much, for the default model


@dataclass(frozen=True, slots=True)
class Site:
    """What a command is made from.

    Attributes:
        folder: Where the environments are.
        models: The default model's files.
        threads: Compute threads.
        port: A free port, for servers.
    """

    folder: Path
    models: ModelFiles
    threads: int
    port: int = 0


@dataclass(frozen=True, slots=True)
class Peer:
    """One program with one set of weights.

    Attributes:
        title: For people.
        environment: Key of `peers_setup.ENVIRONMENTS`, or `OWN_ENVIRONMENT`.
        command: The command line. A server's listens on `Site.port`; of another program the load's options are missing.
        ready: Path that answers 200 once a server can be used; None: no server, see `bench.peers_session.run_program`.
        variables: Environment variables.
        mode: Activation of its requests; `silu` sends no such field.
        ignore_eos: Whether it takes that field. If not, its model has no end-of-text token, or it ignores the field.
        pinned_model: The model's name to send; None asks the server.
        streams: Numbers of streams that it can be run with; None is any.
    """

    title: str
    environment: str
    command: Callable[[Site], list[str]]
    ready: str | None
    variables: Callable[[Site], dict[str, str]] = lambda _: {}
    mode: str = "silu"
    ignore_eos: bool = True
    pinned_model: Callable[[Site], str] | None = None
    streams: tuple[int, ...] | None = None


def _siluette(*options: str) -> Callable[[Site], list[str]]:
    def command(site: Site) -> list[str]:
        serve = [sys.executable, "-m", "server.cli", "serve", "--host", HOST, "--port", str(site.port)]
        return [*serve, "--dtype", "bfloat16", "--threads", str(site.threads), *options]

    return command


def _vllm(site: Site) -> list[str]:
    program = site.folder / "vllm" / "bin" / "vllm"
    serve = [str(program), "serve", str(site.models.hugging_face), "--served-model-name", NAME_OF_MODEL]
    return [*serve, "--dtype", "bfloat16", "--host", HOST, "--port", str(site.port)]


def _vllm_variables(bind: Callable[[Site], str]) -> Callable[[Site], dict[str, str]]:
    return lambda site: {
        "VLLM_CPU_OMP_THREADS_BIND": bind(site),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_NO_USAGE_STATS": "1",
    }


def _cores(site: Site) -> str:
    return ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[: site.threads])


def _llama_server(weights: str) -> Callable[[Site], list[str]]:
    def command(site: Site) -> list[str]:
        python = str(interpreter(site.folder, "llama"))
        model = ["--model", str(site.models.gguf[weights]), "--model_alias", NAME_OF_MODEL, "--n_ctx", "2048"]
        # Half of the cores for decoding is its own default, and on two cores up to twice as fast as all of them:
        # llama.cpp's threads wait for each other without sleeping, and the server needs a core for every token too.
        threads = ["--n_threads", str(max(1, site.threads // 2)), "--n_threads_batch", str(site.threads)]
        # Its defaults are logits of the whole prompt, and to drop an answer when the next request arrives.
        others = ["--logits_all", "false", "--interrupt_requests", "false"]
        return [python, "-m", "llama_cpp.server", *model, *threads, *others, "--host", HOST, "--port", str(site.port)]

    return command


def _llama_program(weights: str) -> Callable[[Site], list[str]]:
    def command(site: Site) -> list[str]:
        script = str(Path(__file__).with_name("peers_llama.py"))
        return [str(interpreter(site.folder, "llama")), script, "measure", str(site.models.gguf[weights])]

    return command


def _transformers_server(site: Site) -> list[str]:
    program = str(site.folder / "transformers" / "bin" / "transformers")
    serve = [program, "serve", str(site.models.hugging_face), "--dtype", "bfloat16", "--device", "cpu"]
    return [
        *serve,
        "--continuous-batching",
        "--cb-num-blocks",
        str(KV_BLOCKS),
        "--host",
        HOST,
        "--port",
        str(site.port),
    ]


def _transformers_program(site: Site) -> list[str]:
    script = str(Path(__file__).with_name("peers_generate.py"))
    return [str(interpreter(site.folder, "transformers")), script, str(site.models.hugging_face)]


def _torch_threads(site: Site) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(site.threads)}


def _own(title: str, mode: str, *options: str) -> Peer:
    return Peer(f"Siluette {title}", OWN_ENVIRONMENT, _siluette(*options), ready="/health/ready", mode=mode)


def _llama(title: str, weights: str) -> dict[str, Peer]:
    return {
        f"llama-{weights}": Peer(
            f"llama.cpp {title}, its Python server", "llama", _llama_server(weights), ready="/v1/models"
        ),
        f"llama-{weights}-capi": Peer(
            f"llama.cpp {title}, C API", "llama", _llama_program(weights), ready=None, streams=(1,)
        ),
    }


PEERS: Mapping[str, Peer] = {
    "siluette-bf16": _own("bf16", "silu"),
    "siluette-bf16-relu": _own("bf16, RELU", "relu"),
    "siluette-int8": _own("int8", "silu", "--quantize", "int8"),
    "siluette-int8-relu": _own("int8, RELU", "relu", "--quantize", "int8"),
    "siluette-int4": _own("int4", "silu", "--quantize", "int4"),
    "siluette-int4-relu": _own("int4, RELU", "relu", "--quantize", "int4"),
    "vllm": Peer("vLLM bf16, all cores", "vllm", _vllm, ready="/health", variables=_vllm_variables(_cores)),
    "vllm-auto": Peer(
        "vLLM bf16, its own choice of cores",
        "vllm",
        _vllm,
        ready="/health",
        variables=_vllm_variables(lambda _: "auto"),
    ),
    **_llama("bf16", "bf16"),
    **_llama("Q8_0", "q8_0"),
    **_llama("Q4_1", "q4_1"),
    "transformers-serve": Peer(
        "transformers serve, bf16",
        "transformers",
        _transformers_server,
        ready="/health",
        variables=_torch_threads,
        ignore_eos=False,
        pinned_model=lambda site: str(site.models.hugging_face),
    ),
    "transformers-generate": Peer(
        "transformers generate, bf16, no server",
        "transformers",
        _transformers_program,
        ready=None,
        variables=_torch_threads,
    ),
}


def describe(peer: Peer, site: Site) -> str:
    """Variables and command line without the folders of this machine and the port, which was a free one."""
    words = [f"{name}={value}" for name, value in peer.variables(site).items()]
    for word in peer.command(site):
        if word == str(site.port):
            words.append("PORT")
        else:
            words.append(Path(word).name if os.sep in word else word)
    return " ".join(words)
