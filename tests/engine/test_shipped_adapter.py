"""The adapter that comes with the default model, against peft and transformers, and against what its card promises."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from engine import LLM, Activation, ActivationMode, DType, EngineConfig, SamplingParams
from engine.models.checkpoint import DEFAULT_ADAPTER, resolve_model

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "models" / DEFAULT_ADAPTER
TEXT = (
    "The lighthouse keeper climbed the stairs every evening, lit the lamp and watched the ships go by. When the fog "
    "came in, he rang the bell. Nobody in the village remembered a time before him, and the children believed that he "
    "had always been there, like the rocks below the tower."
)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(config=EngineConfig(dtype=DType.FLOAT32, kv_cache_mib=256)) as llm:
        yield llm


def perplexity(llm: LLM, activation: Activation) -> float:
    (score,) = llm.score([llm.tokenizer.encode(TEXT)], activation)
    return math.exp(-sum(score.logprobs) / len(score.logprobs))


def test_it_is_merged_by_default_and_all_modes_are_allowed(llm: LLM) -> None:
    assert llm.info.adapter == DEFAULT_ADAPTER
    assert llm.info.support.tuned
    assert set(llm.info.support.modes) == set(ActivationMode)
    assert (llm.info.support.min_p, llm.info.support.max_p) == (0.0, 1.0)
    assert len(llm.info.quality.sparsity) == llm.info.num_layers


def test_it_gives_the_logits_that_peft_gives(llm: LLM) -> None:
    path = resolve_model(None, lambda line: None).path
    base = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, FOLDER).eval()
    ids = llm.tokenizer.encode(TEXT)
    with torch.no_grad():
        logprobs = adapted(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    (score,) = llm.score([ids], Activation("silu"))

    torch.testing.assert_close(torch.tensor(score.logprobs), expected, atol=2e-3, rtol=0)


def test_every_mode_predicts_text_about_as_well_as_silu(llm: LLM) -> None:
    silu = perplexity(llm, Activation("silu"))

    assert perplexity(llm, Activation("stochastic", p=0.5, seed=1)) < 1.5 * silu
    assert perplexity(llm, Activation("relu")) < 2 * silu  # 200 times without the adapter


def test_relu_answers_in_text_that_silu_finds_likely(llm: LLM) -> None:
    prompt = llm.tokenizer.encode_chat([{"role": "user", "content": "Explain how plants make food."}])
    sampling = SamplingParams(temperature=0, max_tokens=40)

    (output,) = llm.generate([prompt], sampling, Activation("relu"))
    answer = list(output.samples[0].token_ids)
    (score,) = llm.score([prompt + answer], Activation("silu"))

    assert "photosynthesis" in output.samples[0].text.lower()
    assert -sum(score.logprobs[-len(answer) :]) / len(answer) < 2


def test_none_switches_it_off() -> None:
    with LLM(config=EngineConfig(adapter="none", dtype=DType.FLOAT32, kv_cache_mib=64)) as untouched:
        assert untouched.info.adapter is None
        assert not untouched.info.support.tuned


def test_it_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 40 * 2**20
