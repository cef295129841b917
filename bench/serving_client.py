"""A client process of bench/serving.py: connections that ask one after the other and wait for each answer.

python bench/serving_client.py PLAN < nothing > JSON. It imports nothing but the standard library, so that it starts at
once and takes little of the cores that it shares with the server.
"""

import json
import random
import socket
import sys
import threading
import time
from pathlib import Path

BOUNDARY = b"rmt-bench"


def request(image: bytes, task: str) -> bytes:
    """A whole HTTP request for one image and one task."""
    head = b"--" + BOUNDARY + b"\r\nContent-Disposition: form-data; name="
    body = head + b'"tasks"\r\n\r\n' + task.encode() + b"\r\n"
    body += head + b'"images"; filename="i.jpg"\r\nContent-Type: image/jpeg\r\n\r\n' + image + b"\r\n"
    body += b"--" + BOUNDARY + b"--\r\n"
    lines = (
        b"POST /v1/classify HTTP/1.1", b"Host: bench", b"Content-Type: multipart/form-data; boundary=" + BOUNDARY,
        b"Content-Length: %d" % len(body), b"", body,
    )  # fmt: skip
    return b"\r\n".join(lines)


class Connection:
    """Kept alive over all requests."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rest = b""

    def ask(self, data: bytes) -> tuple[int, bytes]:
        """(status, body)."""
        self.socket.sendall(data)
        while b"\r\n\r\n" not in self.rest:
            self._more()
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        length = next(
            int(v)
            for k, _, v in (line.partition(b":") for line in head.split(b"\r\n"))
            if k.lower() == b"content-length"
        )
        while len(self.rest) < length:
            self._more()
        body, self.rest = self.rest[:length], self.rest[length:]
        return int(head.split(b" ", 2)[1]), body

    def _more(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed the connection")
        self.rest += data


def client(plan: dict, seed: int, requests: list[bytes], out: list) -> None:
    """Appends (seconds since `begin` at the end, seconds it took) of every request that is answered before `end`."""
    draw, connection = random.Random(seed), Connection(plan["port"])
    while (now := time.time()) < plan["end"]:
        if now < plan["warm"]:
            time.sleep(min(0.01, plan["warm"] - now))
            continue
        start = time.perf_counter()
        status, body = connection.ask(draw.choice(requests))
        took = time.perf_counter() - start
        if status != 200:
            raise RuntimeError(f"status {status}: {body[:200]!r}")
        if plan["begin"] <= now and time.time() <= plan["end"]:
            out.append(took)


def main() -> None:
    """The plan: port, warm, begin, end (seconds since the epoch), images (files), tasks, seeds (one a connection)."""
    plan = json.loads(sys.argv[1])
    images = [Path(path).read_bytes() for path in plan["images"]]
    requests = [request(image, task) for image in images for task in plan["tasks"]]
    out: list[float] = []
    threads = [threading.Thread(target=client, args=(plan, seed, requests, out)) for seed in plan["seeds"]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json.dump({"seconds": out}, sys.stdout)


if __name__ == "__main__":
    main()
