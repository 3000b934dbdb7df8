"""What the overhead benchmark computes, and its raw-socket client."""

import asyncio
import json
import sys

import pytest

from bench.http_overhead import Side, summarise

EVENTS = b'data: {"choices": [{"text": "a"}]}\n\n' * 3
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def test_loss_and_cost_are_http_against_the_engine_alone() -> None:
    engine = [Side(100, 1.0, 1.0), Side(100, 2.0, 1.0)]
    http = [Side(100, 1.25, 1.1, 0.01), Side(100, 2.0, 1.2, 0.01)]
    result = summarise(engine, http)
    assert result["throughput_loss_by_round"] == {"median": 0.1, "min": 0.0, "max": 0.2}
    assert result["throughput_loss_of_medians"] == pytest.approx(1 - 65 / 75, abs=1e-4)
    assert result["http_cpu_us_per_token"] == {"median": 1500.0, "min": 1000.0, "max": 2000.0}
    assert result["client_cpu_us_per_token"]["median"] == 100.0
    assert result["engine"]["tokens_per_second"] == {"median": 75.0, "min": 50.0, "max": 100.0}


async def read_with_client(answer: bytes, size: int, connections: int) -> tuple[int, dict[str, float], list[bytes]]:
    """Run `bench.sse_reader` against a server that says `answer` in pieces of `size` bytes."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"}"))
        for start in range(0, len(answer), size):
            writer.write(answer[start : start + size])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    task = {
        "host": "127.0.0.1",
        "port": server.sockets[0].getsockname()[1],
        "path": "/x",
        "bodies": ['{"n": 1}'] * connections,
    }
    pipe = asyncio.subprocess.PIPE
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.sse_reader", stdin=pipe, stdout=pipe, stderr=pipe
    )
    output, _ = await client.communicate(json.dumps(task).encode())
    server.close()
    assert client.returncode is not None
    return client.returncode, json.loads(output or b"{}"), requests


@pytest.mark.parametrize("size", [1, 5, 64, 10_000])
async def test_client_counts_events_and_tokens_of_all_connections(size: int) -> None:
    status, result, requests = await read_with_client(HEAD + EVENTS + USAGE + b"data: [DONE]\n\n", size, 4)
    assert status == 0
    assert (result["tokens"], result["events"]) == (4 * 3, 4 * 4)
    assert all(request.startswith(b"POST /x HTTP/1.1\r\n") for request in requests)


@pytest.mark.parametrize("answer", [HEAD + EVENTS, HEAD + EVENTS + b"data: [DONE]\n\n", b"HTTP/1.1 500 x\r\n\r\n"])
async def test_client_fails_on_an_answer_that_is_not_complete(answer: bytes) -> None:
    status, _, _ = await read_with_client(answer, 100, 1)
    assert status != 0
