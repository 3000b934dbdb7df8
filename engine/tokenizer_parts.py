"""What a tokenizer is made of, whatever file it came from."""

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """The parts that `engine.tokenizer.Tokenizer` is built from.

    Attributes:
        backend: The tokenizer proper; never changed after it was loaded.
        eos_token_ids: Tokens that end a text, without repeats.
        special_tokens: Text of `bos_token`, `eos_token`, ... as chat templates call them.
        chat_template: Jinja source, None if the model has no template.
    """

    backend: Backend
    eos_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, str]
    chat_template: str | None


def frame_texts(backend: Backend, bos: str | None, eos: str | None) -> None:
    """Make `backend` put `bos` before and `eos` after a text when asked for special tokens; None puts nothing.

    Raises:
        ValueError: A token is not in the vocabulary.
    """
    frame = {token: backend.token_to_id(token) for token in (bos, eos) if token is not None}
    for token, token_id in frame.items():
        if token_id is None:
            raise ValueError(f"special token {token!r} is not in the vocabulary")
    template = [*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])]
    backend.post_processor = TemplateProcessing(single=template, special_tokens=list(frame.items()))
