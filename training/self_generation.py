"""Training text that the model writes itself, with this project's engine.

A chat model is given nothing but the template's opening of a user's turn, so it writes the user's message; then it
answers it (Magpie, arXiv 2406.08464). A model without a template writes documents from the beginning-of-text token.

    python -m training.self_generation --output chats.jsonl --count 5000
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer

from training.conversations import Conversation, append_batch, resume
from training.errors import GenerationError, TrainingError

if TYPE_CHECKING:
    from engine import LLM, EngineConfig, SampleOutput, SamplingParams

MARKER = "USER-MESSAGE-GOES-HERE"
MAX_BATCH = 128  # samples of one request
MAX_FRUITLESS_BATCHES = 5


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How text is written.

    Attributes:
        batch_size: User messages or documents that are sampled at once, 1 to 128.
        temperature: Of every token.
        top_p: Of every token.
        max_user_tokens: A user message that does not end within so many tokens is discarded.
        min_user_tokens: One with fewer tokens is discarded.
        max_answer_tokens: An answer or document is cut off here.

    Raises:
        GenerationError: `batch_size` is out of range.
    """

    batch_size: int = MAX_BATCH
    temperature: float = 1.0
    top_p: float = 0.95
    max_user_tokens: int = 96
    min_user_tokens: int = 4
    max_answer_tokens: int = 320

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= MAX_BATCH:
            raise GenerationError(f"batch_size must be in [1, {MAX_BATCH}], got {self.batch_size}")


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """What a chat template puts around a user's message.

    Attributes:
        before: Tokens before it, the system prompt that the template adds by itself included.
        after: Tokens after it: the end of the user's turn and the opening of the assistant's.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> "ChatFrame":
        """Find it by rendering a chat with a marker in the message's place.

        Args:
            tokenizer: `LLM.tokenizer`.

        Raises:
            GenerationError: There is no template, or it does not write a message as it is.
        """
        if not tokenizer.has_chat_template:
            raise GenerationError("this model has no chat template, so it can only write documents, not chats")
        chat = tokenizer.apply_chat_template([{"role": "user", "content": MARKER}])
        before, marker, after = chat.partition(MARKER)
        if not marker or not after or MARKER in after:
            raise GenerationError("cannot find the user's message in what this model's chat template writes")
        return cls(
            tuple(tokenizer.encode(before, add_special_tokens=False)),
            tuple(tokenizer.encode(after, add_special_tokens=False)),
        )


def fast_config(model: str | None = None, threads: int | None = None, device: str = "cpu") -> "EngineConfig":
    """Settings for an engine that writes a lot of text at once: the untouched model, in large batches."""
    from engine import EngineConfig
    from engine.config import Device

    return EngineConfig(
        model=model,
        adapter="none",
        device=Device(device),
        threads=threads,
        max_num_seqs=MAX_BATCH,
        max_num_batched_tokens=512,
    )


Batch = tuple[int, list[Conversation]]  # its number, and what is of use of it: nothing, it may be


def generate_chats(
    llm: "LLM", count: int, seed: int, settings: GenerationSettings | None = None
) -> Iterator[Conversation]:
    """Conversations of one message and one answer, no message twice.

    Args:
        llm: Fastest with `fast_config`; with `deterministic=True` the text is a function of seed and settings alone.
        count: Number of conversations.
        seed: At least 0.
        settings: How they are written.

    Raises:
        GenerationError: The model has no usable chat template, or what it writes is of no use again and again.
        InvalidRequest: The settings do not fit the model's context or are out of range.
    """
    return _first(count, chat_batches(llm, seed, settings or GenerationSettings()))


def generate_documents(
    llm: "LLM", count: int, seed: int, settings: GenerationSettings | None = None
) -> Iterator[Conversation]:
    """Documents from the beginning-of-text token on, as conversations without a message.

    Args and errors are those of `generate_chats`; no chat template is needed.
    """
    return _first(count, document_batches(llm, seed, settings or GenerationSettings()))


def chat_batches(
    llm: "LLM", seed: int, settings: GenerationSettings, first: int = 0, known: Collection[str] = ()
) -> Iterator[Batch]:
    """Batches of conversations without end. A batch depends on `seed`, its number and the messages known before it.

    Args:
        llm: The model.
        seed: At least 0.
        settings: How they are written.
        first: Number of the first batch.
        known: User messages that exist already.

    Raises:
        GenerationError: As `generate_chats`.
        InvalidRequest: As `generate_chats`.
    """
    frame = ChatFrame.of(llm.tokenizer)
    users = set(known)

    def write(seeds: Sequence[int]) -> list[Conversation]:
        messages = _write_messages(llm, frame, settings, seeds[0])
        new = {text: ids for text, ids in messages if text not in users}
        users.update(new)
        prompts = [[*frame.before, *ids, *frame.after] for ids in new.values()]
        answers = _complete(llm, prompts, _sampling(settings, settings.max_answer_tokens), seeds[1:])
        return [
            _conversation(llm, text, prompt, answer) for text, prompt, answer in zip(new, prompts, answers, strict=True)
        ]

    return _batches(write, seed, settings.batch_size, first)


def document_batches(llm: "LLM", seed: int, settings: GenerationSettings, first: int = 0) -> Iterator[Batch]:
    """Batches of documents without end. A batch depends on `seed` and its number."""
    tokenizer = llm.tokenizer
    # Without BOS, what stands between documents in training text is what a document begins after.
    start = tokenizer.encode("")[:1] or list(tokenizer.eos_token_ids[:1])
    if not start:
        raise GenerationError("this model has neither a BOS nor an EOS token that a document could begin after")

    def write(seeds: Sequence[int]) -> list[Conversation]:
        sampling = replace(_sampling(settings, settings.max_answer_tokens), n=settings.batch_size, seed=seeds[0])
        return [_conversation(llm, "", start, sample) for sample in llm.generate([start], sampling)[0].samples]

    return _batches(write, seed, settings.batch_size, first)


def write_texts(
    llm: "LLM",
    path: Path,
    count: int,
    seed: int,
    settings: GenerationSettings | None = None,
    *,
    chats: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> int:
    """Write conversations or documents to a JSONL file, whole batches until it has at least `count`.

    A run that was killed goes on after the last whole batch of the file.

    Args:
        llm: As `generate_chats`.
        path: The file; training reads its `token_ids`.
        count: Least number of texts in the file.
        seed: At least 0; the file's own, if it exists.
        settings: How they are written.
        chats: Conversations, not documents.
        report: Called with a line of text after each batch.

    Returns:
        Number of texts in the file.

    Raises:
        GenerationError: As `generate_chats`; or the file is of another seed or was not written by this function.
    """
    settings = settings or GenerationSettings()
    progress = resume(path, seed)
    if progress.num_conversations >= count:
        return progress.num_conversations
    path.parent.mkdir(parents=True, exist_ok=True)
    if chats:
        batches = chat_batches(llm, seed, settings, progress.next_batch, progress.users)
    else:
        batches = document_batches(llm, seed, settings, progress.next_batch)
    for number, conversations in batches:
        append_batch(path, seed, number, conversations)
        progress.add(number, conversations)
        report(f"batch {number}: {progress.num_conversations:,} of {count:,} texts, {progress.num_tokens:,} tokens")
        if progress.num_conversations >= count:
            break
    return progress.num_conversations


def _first(count: int, batches: Iterator[Batch]) -> Iterator[Conversation]:
    left = count
    while left > 0:
        conversations = next(batches)[1][:left]
        left -= len(conversations)
        yield from conversations


def _batches(write: Callable[[Sequence[int]], list[Conversation]], seed: int, size: int, first: int) -> Iterator[Batch]:
    if seed < 0:
        raise GenerationError(f"seed must be at least 0, got {seed}")
    number, fruitless = first, 0
    while fruitless < MAX_FRUITLESS_BATCHES:
        words = np.random.SeedSequence([seed, number]).generate_state(1 + size, np.uint64)
        conversations = [item for item in write([int(word >> np.uint64(1)) for word in words]) if item.answer.strip()]
        fruitless = 0 if conversations else fruitless + 1
        yield number, conversations
        number += 1
    raise GenerationError(f"nothing of use in {fruitless} batches in a row: this model cannot write such text")


def _write_messages(
    llm: "LLM", frame: ChatFrame, settings: GenerationSettings, seed: int
) -> list[tuple[str, list[int]]]:
    """User messages that ended and are of use: text and tokens without the end of the turn."""
    turn_end = frame.after[0]
    sampling = replace(
        _sampling(settings, settings.max_user_tokens), n=settings.batch_size, seed=seed, stop_token_ids=(turn_end,)
    )
    messages = []
    for sample in llm.generate([frame.before], sampling)[0].samples:
        if sample.token_ids[-1] != turn_end or len(sample.token_ids) <= settings.min_user_tokens:
            continue
        ids = sample.token_ids[:-1]
        text = llm.tokenizer.decode(ids)
        if text.strip() and text == llm.tokenizer.decode(ids, skip_special_tokens=False):
            messages.append((text.strip(), ids))
    return messages


def _complete(
    llm: "LLM", prompts: Sequence[Sequence[int]], sampling: "SamplingParams", seeds: Sequence[int]
) -> list["SampleOutput"]:
    """Complete prompts together, each with its own seed: one seed for all would make answers of prompts of the same
    length resemble each other."""
    streams = [llm.stream(prompt, replace(sampling, seed=seed)) for prompt, seed in zip(prompts, seeds, strict=False)]
    outputs = [next(stream) for stream in streams]  # the first piece of a stream is what puts it into the batch
    for output, stream in zip(outputs, streams, strict=True):
        for piece in stream:
            output.extend(piece)
    return [output.samples[0] for output in outputs]


def _sampling(settings: GenerationSettings, max_tokens: int) -> "SamplingParams":
    from engine import SamplingParams

    return SamplingParams(temperature=settings.temperature, top_p=settings.top_p, max_tokens=max_tokens)


def _conversation(llm: "LLM", user: str, prompt: Sequence[int], answer: "SampleOutput") -> Conversation:
    token_ids = (*prompt, *answer.token_ids)
    return Conversation(
        user=user,
        answer=answer.text,
        token_ids=token_ids,
        text=llm.tokenizer.decode(token_ids, skip_special_tokens=False),
        finished=answer.finish_reason == "stop",
    )


def main(
    output: Annotated[Path, typer.Option(help="JSONL file; one that exists is continued.")],
    count: Annotated[int, typer.Option(min=1, help="Least number of texts in the file.")] = 5000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the file.")] = 0,
    model: Annotated[str | None, typer.Option(help="Model; the default model if left out.")] = None,
    documents: Annotated[bool, typer.Option("--documents", help="Write documents instead of chats.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Texts that are written at once.")] = MAX_BATCH,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="What computes.")] = "cpu",
) -> None:
    """Let a model write its own training text."""
    from engine import LLM, EngineError

    try:
        with LLM(config=fast_config(model, device=device), progress=typer.echo) as llm:
            settings = GenerationSettings(batch_size=batch_size)
            write_texts(llm, output, count, seed, settings, chats=not documents, report=typer.echo)
    except (TrainingError, EngineError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
