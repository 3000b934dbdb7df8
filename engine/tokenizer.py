"""Text to token ids and back, and chat messages to a prompt."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.chat_template import ChatTemplate
from engine.errors import InvalidRequest, ModelLoadError
from engine.models.gguf_file import GgufFile
from engine.token_bytes import token_bytes
from engine.tokenizer_gguf import load_gguf
from engine.tokenizer_hf import load_folder
from engine.tokenizer_parts import TokenizerParts


def load_tokenizer(source: Path | GgufFile) -> "Tokenizer":
    """Load the tokenizer of a model.

    Args:
        source: A Hugging Face folder, or a `.gguf` file or its path.

    Raises:
        ModelLoadError: Files are missing, malformed or of a kind that is not supported.
    """
    if isinstance(source, GgufFile):
        return Tokenizer(load_gguf(source))
    if source.is_dir():
        return Tokenizer(load_folder(source))
    if source.suffix.lower() == ".gguf":
        return Tokenizer(load_gguf(GgufFile(source)))
    raise ModelLoadError(f"cannot load a tokenizer from {source}: neither a Hugging Face folder nor a .gguf file")


class Tokenizer:
    """The tokenizer of one model.

    Nothing in it changes after construction, so any number of threads may use it at once. (transformers' own wrapper
    sets truncation and padding of the shared backend on every call; this one does not use it.)

    Attributes:
        vocab_size: Ids 0 to `vocab_size - 1` can be decoded; a model's embedding may have more rows.
        eos_token_ids: Ids that end a text.
        prefix_spaces: Spaces that encoding puts in front of a text (0, or 1 for SentencePiece).

    Raises:
        ModelLoadError: The tokenizer's decoder is not supported, or its chat template is no valid Jinja.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._backend = parts.backend
        self._bytes = token_bytes(parts.backend)
        source = parts.chat_template
        self._chat_template = None if source is None else ChatTemplate(source, parts.special_tokens)
        self.vocab_size = len(self._bytes.all)
        self.eos_token_ids = parts.eos_token_ids
        self.prefix_spaces = self._bytes.prefix_spaces

    @property
    def has_chat_template(self) -> bool:
        """Whether the model can take chat messages."""
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens that are spelled out in it (`<|im_start|>`) become one id each.

        Bytes that the vocabulary has no token for are dropped, as the model's own tokenizer does (SmolLM2 lacks those
        of a few control characters).

        Args:
            text: Any text.
            add_special_tokens: Begin with BOS (end with EOS) where the model wants that.

        Raises:
            InvalidRequest: The text holds half of a surrogate pair, so it is not Unicode text.
        """
        return self._encode(text, add_special_tokens, "prompt")

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of chat messages. BOS is there if the template writes it, so never twice.

        Raises:
            InvalidRequest: As `apply_chat_template`.
        """
        return self._encode(self.apply_chat_template(messages, add_generation_prompt), False, "messages")

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt of chat messages, as the model's template writes it (sandboxed Jinja).

        Args:
            messages: `{"role": ..., "content": ...}` and whatever else the template reads.
            add_generation_prompt: End with the beginning of the assistant's answer.

        Raises:
            InvalidRequest: The model has no template or the template rejects the messages; `field` is `"messages"`.
        """
        if self._chat_template is None:
            raise InvalidRequest("this model has no chat template; send a plain prompt instead of messages", "messages")
        if not messages:
            raise InvalidRequest("messages must hold at least one message", "messages")
        try:
            return self._chat_template.render(messages, add_generation_prompt)
        except Exception as error:  # a template is a program of the checkpoint's author: it may raise anything
            raise InvalidRequest(f"the model's chat template rejects the messages: {error}", "messages") from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True, continuation: bool = False) -> str:
        """Text of token ids. Incomplete or invalid UTF-8 becomes U+FFFD, ids outside the vocabulary become nothing.

        Args:
            ids: Token ids.
            skip_special_tokens: Leave out special tokens such as EOS.
            continuation: The ids continue an earlier text: keep a leading space that is taken for the one that encoding
                puts in front of a text otherwise (SentencePiece only).
        """
        pieces = self.pieces(skip_special_tokens)
        size = len(pieces)
        text = b"".join([pieces[i] for i in ids if 0 <= i < size]).decode("utf-8", "replace")
        return text if continuation else self.strip_prefix(text)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one token stands for; not always valid UTF-8. Nothing for an id outside the vocabulary."""
        return self._bytes.all[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """Text of one token alone, special or not; U+FFFD where it is only a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def pieces(self, skip_special_tokens: bool) -> tuple[bytes, ...]:
        """Bytes of each token id, [vocab_size]; with `skip_special_tokens`, special tokens have none."""
        return self._bytes.visible if skip_special_tokens else self._bytes.all

    def strip_prefix(self, text: str) -> str:
        """A decoded text without the spaces that encoding puts in front."""
        spaces = self.prefix_spaces
        while spaces and text.startswith(" "):
            text = text[1:]
            spaces -= 1
        return text

    def _encode(self, text: str, add_special_tokens: bool, field: str) -> list[int]:
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # what tokenizers says to a str that has no UTF-8 form
            raise InvalidRequest(f"{field} holds an unpaired surrogate, which is not Unicode text", field) from None
        return ids
