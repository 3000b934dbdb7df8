"""`/tokenize` and `/detokenize`."""

import httpx
import pytest

from engine import AsyncEngine
from server.encoding import INLINE_CHARS


@pytest.mark.parametrize("text", ["Hello", "", "naïve 🦊 <|im_end|>", "long " * (INLINE_CHARS // 4)])
async def test_round_trip(client: httpx.AsyncClient, engine: AsyncEngine, text: str) -> None:
    answer = (await client.post("/tokenize", json={"prompt": text, "add_special_tokens": False})).json()

    assert answer["tokens"] == engine.tokenizer.encode(text, add_special_tokens=False)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == engine.info.max_model_len
    assert (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json() == {"prompt": text}


async def test_messages_go_through_the_chat_template(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    answer = (await client.post("/tokenize", json={"messages": messages})).json()

    assert answer["tokens"] == engine.tokenizer.encode_chat(messages)
