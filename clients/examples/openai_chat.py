"""Siluette with OpenAI's own package: activation and seeds go through `extra_body` and come back in the answer.

python openai_chat.py [BASE_URL]        (pip install openai)
"""

import sys
from typing import Any

from openai import OpenAI


def main(base_url: str) -> None:
    """Ask for three greedy answers that differ only by their activations' draws, then stream one of them again."""
    client = OpenAI(base_url=f"{base_url}/v1", api_key="unused")
    model = client.models.list().data[0].id
    request: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "Name a planet and say why you like it."}],
        "temperature": 0,
        "max_tokens": 24,
    }

    activation = {"mode": "stochastic", "p": 0.7, "scope": "decode"}
    answer = client.chat.completions.create(**request, n=3, extra_body={"activation": activation})
    for choice in answer.choices:
        print(f"{choice.index}: {choice.message.content!r}")

    used: dict[str, Any] = (answer.model_extra or {})["activation"]
    print(f"used: {used}")
    stream = client.chat.completions.create(**request, stream=True, extra_body={"activation": used})
    print("again: ", end="")
    for chunk in stream:
        for piece in chunk.choices:
            print(piece.delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8000")
