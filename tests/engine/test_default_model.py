"""The default model against transformers: the same file, read and run by two independent programs."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import LLM, Activation, DType, EngineConfig, SamplingParams
from engine.models.checkpoint import resolve_model
from engine.outputs import RequestOutput

pytestmark = pytest.mark.slow

NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
TEXTS = [
    "Once upon a time",
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):\n",
    "In 1969, the first human being",
    "Dear Sir or Madam,\n\n",
    "1, 1, 2, 3, 5, 8,",
    "La lune est",
    "東京は",
    "The three laws of thermodynamics are:\n1.",
    "To make bread you need flour,",
    "<html>\n  <head>",
]
QUESTIONS = [
    "What is a prime number?",
    "Name three rivers in Africa.",
    "Write a haiku about the sea.",
    "Why is the sky blue?",
    "How do vaccines work?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
]
LONG_TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 20  # several prefill steps


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(config=EngineConfig(adapter="none", dtype=DType.FLOAT32, kv_cache_mib=256)) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    path = resolve_model(None, lambda line: None).path
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    chats = [llm.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [*map(llm.tokenizer.encode, [*TEXTS, LONG_TEXT]), *chats]


@pytest.fixture(scope="module")
def outputs(llm: LLM, prompts: list[list[int]]) -> list[RequestOutput]:
    """All prompts in one batch."""
    return llm.generate(prompts, GREEDY, Activation())


@torch.inference_mode()
def generated(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of transformers, which goes on after the end-of-sequence token. Prompts are padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    sequences: Tensor = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=-1, pad_token_id=0
    )
    tokens: list[list[int]] = sequences[:, longest:].tolist()
    return tokens


def describe_difference(model: PreTrainedModel, prompt: list[int], ours: list[int], theirs: list[int]) -> str:
    """Where two continuations part, and how near a tie that is for transformers."""
    at = next(index for index, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + theirs[:at]])).logits[0, -1]
    margin = float(logits[theirs[at]] - logits[ours[at]])
    return f"token {at} is {ours[at]}, transformers has {theirs[at]}, whose logit is higher by {margin:.2e}"


def test_greedy_tokens_equal_transformers(
    outputs: list[RequestOutput], reference: PreTrainedModel, prompts: list[list[int]]
) -> None:
    assert len(prompts) == 20
    differences = {}
    for index, theirs in enumerate(generated(reference, prompts)):
        ours = outputs[index].samples[0].token_ids
        assert len(ours) == len(theirs) == NUM_TOKENS
        if ours != theirs:
            differences[index] = describe_difference(reference, prompts[index], ours, theirs)

    assert differences == {}


@torch.inference_mode()
def test_each_token_is_the_likeliest_for_transformers_and_its_log_probability_the_same(
    outputs: list[RequestOutput], reference: PreTrainedModel, prompts: list[list[int]]
) -> None:
    """One prompt at a time, without padding and without a cache."""
    for prompt, output in zip(prompts, outputs, strict=True):
        sample = output.samples[0]
        logits = reference(torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1]
        best = logits.log_softmax(-1).max(-1)

        assert sample.logprobs is not None
        found = torch.tensor([position.chosen.logprob for position in sample.logprobs])

        assert sample.token_ids == best.indices.tolist()
        torch.testing.assert_close(found, best.values, rtol=0, atol=1e-3)
