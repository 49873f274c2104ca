"""An OpenAI-compatible server that answers as a test says, and remembers what it was asked."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import cv2
import numpy as np


@dataclass(frozen=True)
class Reply:
    """What a server sends; `cut` closes the connection before the end of the body."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    after_s: float = 0.0
    cut: bool = False


def said(text: str | None, finish: str = "stop") -> Reply:
    """A well-formed answer."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return Reply(body=json.dumps({"object": "chat.completion", "choices": [choice]}).encode())


def question(body: dict[str, Any]) -> str:
    """The last words of a request: what the user asks."""
    return body["messages"][-1]["content"][-1]["text"]


def jpeg(seed: int = 0, width: int = 48, height: int = 32) -> bytes:
    """A small picture."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    return cv2.imencode(".jpg", noise)[1].tobytes()


class _Listener(ThreadingHTTPServer):
    request_queue_size = 128  # with five, a sixth who comes at once waits a second


class Server:
    """Answers on a free port of this machine, in threads, while it is open.

    Args:
        reply: From a request's JSON, and how often the same words were asked before.
        models: What `/v1/models` answers.
    """

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply], models: Reply | None = None):
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: dict[str, list[float]] = {}
        self.most_at_once = 0
        self._reply, self._models = reply, models or Reply(body=b'{"data": [{"id": "tiny"}]}')
        self._at_once, self._seen, self._lock = 0, Counter[str](), threading.Lock()
        self._closing = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._send(self, outer._models)

            def do_POST(self) -> None:
                outer._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = _Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        assert handler.path == "/v1/chat/completions"
        words = question(body)
        with self._lock:
            self.asked.append(body)
            self.keys.append(handler.headers["Authorization"])
            self.times.setdefault(words, []).append(time.monotonic())
            before = self._seen[words]
            self._seen[words] += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        reply = self._reply(body, before)
        self._closing.wait(reply.after_s)
        with self._lock:
            self._at_once -= 1
        self._send(handler, reply)

    def _send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        try:
            handler.send_response(reply.status)
            handler.send_header("Content-Length", str(len(reply.body)))
            for name, value in reply.headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(reply.body[:5] if reply.cut else reply.body)
            handler.close_connection = reply.cut
        except OSError:  # the client did not wait
            handler.close_connection = True
