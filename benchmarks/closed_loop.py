"""`python -m benchmarks.closed_loop PORT PATH BODY CONNECTIONS SECONDS WARM`: ask one server as fast as it answers.

Each connection is kept alive and sends its next request when the last one was answered. What is printed is JSON: the
calls that were answered within SECONDS after WARM seconds, how many a second, and the median and 99th percentile of
their times in milliseconds. Exit code 1 when an answer is not 200.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import cast

import uvloop


class _Connection(asyncio.Protocol):
    """Plain HTTP/1.1 with as little work as can be: client and server share the machine."""

    def __init__(self, request: bytes, times: list[tuple[float, float]], done: asyncio.Future[None]) -> None:
        self._request, self._times, self._done = request, times, done
        self._transport: asyncio.Transport | None = None
        self._began = 0.0
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is of no class of asyncio's
        self._send()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), None)
        if not lines[0].startswith(b"http/1.1 200") or length is None:
            self._fail(f"{head[:200]!r} {body[:200]!r}")
            return
        if len(body) < length:
            return
        now = time.perf_counter()
        self._times.append((now, now - self._began))
        self._buffer = b""
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the connection ended: {error}")

    def _send(self) -> None:
        assert self._transport is not None
        self._began = time.perf_counter()
        self._transport.write(self._request)

    def _fail(self, words: str) -> None:
        if not self._done.done():
            self._done.set_exception(RuntimeError(words))


async def _ask(port: int, request: bytes, connections: int, seconds: float, warm: float) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    times: list[tuple[float, float]] = []
    for _ in range(connections):
        await loop.create_connection(lambda: _Connection(request, times, done), "127.0.0.1", port)
    began = time.perf_counter() + warm
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(done, warm + seconds)
    taken = sorted(took for at, took in times if began <= at <= began + seconds)
    if not taken:
        raise RuntimeError("no call was answered in time")
    return {
        "calls": len(taken),
        "per_second": len(taken) / seconds,
        "p50_ms": 1000 * taken[len(taken) // 2],
        "p99_ms": 1000 * taken[min(len(taken) - 1, int(len(taken) * 0.99))],
    }


def main() -> int:
    port, path, body, connections, seconds, warm = sys.argv[1:]
    content = Path(body).read_bytes()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    request = head.encode() + b"\r\n\r\n" + content
    try:
        found = uvloop.run(_ask(int(port), request, int(connections), float(seconds), float(warm)))
    except (RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
