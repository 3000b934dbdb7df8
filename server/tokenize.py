"""`/tokenize` and `/detokenize`."""

import asyncio

from fastapi import APIRouter

from engine import InvalidRequest
from server.documentation import ERRORS
from server.encoding import INLINE_CHARS, encode_messages, encode_text
from server.protocol import DetokenizeRequest, TokenizeRequest
from server.responses import DetokenizeResponse, TokenizeResponse
from server.services import ServicesDep

router = APIRouter(tags=["tokens"], responses=ERRORS)


@router.post("/tokenize")
async def tokenize(services: ServicesDep, body: TokenizeRequest) -> TokenizeResponse:
    """Token ids of a text, or of a conversation in the model's chat template."""
    services.check_model(body.model)
    tokenizer = services.engine.tokenizer
    if body.prompt is not None:
        tokens = await encode_text(tokenizer, body.prompt, body.add_special_tokens)
    else:
        assert body.messages is not None
        tokens = await encode_messages(tokenizer, body.messages)
    return {"tokens": tokens, "count": len(tokens), "max_model_len": services.engine.info.max_model_len}


@router.post("/detokenize")
async def detokenize(services: ServicesDep, body: DetokenizeRequest) -> DetokenizeResponse:
    """Text of token ids, special tokens included."""
    services.check_model(body.model)
    engine = services.engine
    vocab_size = engine.info.vocab_size
    for token_id in body.tokens:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"token id {token_id} is not in the vocabulary: 0 to {vocab_size - 1}", "tokens")
    if len(body.tokens) <= INLINE_CHARS:
        return {"prompt": engine.tokenizer.decode(body.tokens, skip_special_tokens=False)}
    return {"prompt": await asyncio.to_thread(engine.tokenizer.decode, body.tokens, False)}
