"""Prompts of the offline benchmarks: the load generator's, with the tokenizer at hand instead of a server's."""

from engine import AsyncEngine
from server.loadgen_workload import FIRST_WORD, WORDS, Length, Vocabulary, Workload, plan_requests


class PromptMaker:
    """Makes random English prompts of an exact number of tokens."""

    def __init__(self, engine: AsyncEngine) -> None:
        def count(text: str) -> int:
            return len(engine.tokenizer.encode(text))

        first = count(FIRST_WORD)
        self._vocabulary = Vocabulary.from_counts(
            first, {word: count(f"{FIRST_WORD} {word}") - first for word in WORDS}
        )

    def make(self, count: int, tokens: int, phase: str) -> list[str]:
        """`count` prompts of `tokens` tokens; those of different phases have nothing that a prefix cache could use."""
        workload = Workload(count, Length(tokens), Length(1))
        return [request.prompt for request in plan_requests(workload, self._vocabulary, phase)]
