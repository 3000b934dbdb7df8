"""A round of a peer."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from bench import peers_generate
from bench.peers import main
from bench.peers_catalogue import HOST, Peer, Site
from bench.peers_models import ModelFiles
from bench.peers_session import Load, Session, Settings, load_of, parse_program, run_session
from bench.peers_setup import PeerError
from server.loadgen_client import StreamRecord, Usage
from server.loadgen_report import Outcome, Report
from tests.engine.models.tiny import make_tiny

SETTINGS = Settings(
    streams=(1, 2),
    requests=2,
    prompt_tokens=20,
    output_tokens=6,
    long_prompt=40,
    memory_streams=3,
    memory_tokens=40,
    threads=1,
    start_timeout=600,
    request_timeout=600,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny("llama", path)
    return path


def site(folder: Path) -> Site:
    return Site(folder, ModelFiles(folder / "hf", {}), threads=1)


def program(script: str) -> Peer:
    return Peer("A program", "llama", lambda _: [sys.executable, "-c", script], ready=None, streams=(1,))


class TestProgram:
    def test_last_line_is_the_result(self) -> None:
        load = {
            "streams": 1,
            "requests": 4,
            "output_tokens": 8,
            "tokens_per_second": 2.5,
            "decode_tokens_per_second": 3.5,
        }
        output = "a warning\n" + json.dumps({"loads": [load], "ttft_ms": 12.5, "build": "AVX"}) + "\n"
        assert parse_program(output) == Session((Load(1, 4, 8, 2.5, 3.5),), 12.5, build="AVX")

    @pytest.mark.parametrize("output", ["", "oops", "[1]", '{"loads": [{"speed": 1}], "ttft_ms": 1}', '{"loads": []}'])
    def test_anything_else_is_refused(self, output: str) -> None:
        with pytest.raises(PeerError, match="its last line is no result"):
            parse_program(output)

    async def test_gets_the_settings_as_options(self, tmp_path: Path) -> None:
        script = "import json, sys; print(json.dumps({'loads': [], 'ttft_ms': None, 'build': ' '.join(sys.argv[1:])}))"
        session = await run_session(program(script), site(tmp_path), SETTINGS, 5)
        options = "--threads 1 --requests 2 --prompt-tokens 20 --output-tokens 6 --long-prompt 40 --seed 5"
        assert session.build == options

    async def test_failure_has_its_reason(self, tmp_path: Path) -> None:
        with pytest.raises(PeerError, match=r"A program ended with exit 1: out of memory"):
            await run_session(program("import sys; sys.exit('out of memory')"), site(tmp_path), SETTINGS, 0)


def report(*outcomes: Outcome) -> Report:
    return Report.of(outcomes, started="", duration=2.0, config={}, client_cpu_seconds=0.0, exact_prompts=True)


def answer(tokens: int) -> Outcome:
    return Outcome("silu", StreamRecord(0.0, [0.5, 1.0], 1.5, Usage(10, tokens, 0)))


class TestLoad:
    def test_rate_is_of_complete_answers_over_the_whole_time(self) -> None:
        load = load_of(report(answer(5), answer(5), Outcome("silu", error=("timeout", "late"))), streams=3)
        assert (load.requests, load.failed, load.output_tokens) == (2, 1, 10)
        assert load.tokens_per_second == 5.0
        assert load.decode_tokens_per_second is None

    def test_decoding_alone_is_known_of_one_stream(self) -> None:
        # Four tokens follow the first one within a second.
        assert load_of(report(answer(5)), streams=1).decode_tokens_per_second == pytest.approx(4.0)


class TestGenerate:
    def test_continues_every_row_of_every_batch(self, tiny: Path) -> None:
        pytest.importorskip("transformers")
        options = {"threads": 1, "requests": 3, "prompt_tokens": 5, "output_tokens": 4, "long_prompt": 9, "seed": 0}
        result = peers_generate.measure(Namespace(model=tiny, streams=[1, 3], **options))
        session = parse_program(json.dumps(result))
        assert [(load.streams, load.requests, load.output_tokens) for load in session.loads] == [(1, 3, 12), (3, 3, 12)]
        for load in session.loads:
            assert load.decode_tokens_per_second is not None
            assert load.tokens_per_second > 0


@pytest.mark.slow
class TestServer:
    """Siluette itself on a tiny model, as a peer."""

    def peer(self, tiny: Path, *options: str, mode: str = "silu") -> Peer:
        def command(site: Site) -> list[str]:
            serve = [sys.executable, "-m", "server.cli", "serve", str(tiny), "--host", HOST, "--port", str(site.port)]
            return [*serve, "--threads", str(site.threads), "--kv-cache-mib", "4", *options]

        return Peer("Tiny", "siluette", command, ready="/health/ready", mode=mode)

    @pytest.mark.parametrize("mode", ["silu", "relu"])
    async def test_round_has_every_figure(self, tiny: Path, tmp_path: Path, mode: str) -> None:
        peer = self.peer(tiny, "--allow-untuned-activations", mode=mode)
        session = await run_session(peer, site(tmp_path), SETTINGS, 0)
        assert [(load.streams, load.requests, load.output_tokens) for load in session.loads] == [(1, 2, 12), (2, 2, 12)]
        assert session.complaints == ()
        assert session.ttft_ms is not None
        assert session.seconds_to_ready is not None
        assert (
            session.ttft_ms < 1000 * session.seconds_to_ready
        )  # the engine starts in more time than it takes for a token
        assert session.memory_mib is not None
        assert session.peak_memory_mib is not None
        assert 50 < session.memory_mib <= session.peak_memory_mib

    async def test_an_option_that_it_does_not_know_is_the_reason(self, tiny: Path, tmp_path: Path) -> None:
        with pytest.raises(PeerError, match=r"before it was ready: .*no-such-option"):
            await run_session(self.peer(tiny, "--no-such-option"), site(tmp_path), SETTINGS, 0)

    async def test_refused_requests_are_the_reason(self, tiny: Path, tmp_path: Path) -> None:
        with pytest.raises(PeerError, match=r"a request failed: http_400: .*relu"):
            await run_session(self.peer(tiny, mode="relu"), site(tmp_path), SETTINGS, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "ollama"], "invalid choice: 'ollama'"),
        (["--plot", "picture.pdf"], "must name a file that ends in .svg or .png"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--streams", "0"], "--streams must be at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_installed(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--venvs", str(tmp_path)])
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
