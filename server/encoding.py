"""Text to token ids without holding up the event loop."""

import asyncio
from collections.abc import Sequence

from engine.tokenizer import Tokenizer
from server.protocol import ChatMessage

INLINE_CHARS = 4096  # about a millisecond of work; a thread costs a tenth of that


async def encode_text(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text, a long one in a thread."""
    if len(text) <= INLINE_CHARS:
        return tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)


async def encode_messages(tokenizer: Tokenizer, messages: Sequence[ChatMessage]) -> list[int]:
    """Token ids of a conversation in the model's chat template, a long one in a thread.

    Raises:
        InvalidRequest: The model has no template or the template rejects the messages.
    """
    conversation = [message.to_template() for message in messages]
    if sum(len(message["content"]) for message in conversation) <= INLINE_CHARS:
        return tokenizer.encode_chat(conversation)
    return await asyncio.to_thread(tokenizer.encode_chat, conversation)
