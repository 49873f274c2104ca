"""A server that gives videos as a test says, and remembers what it was asked."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    kind: str = "video/mp4"
    after: str | None = None
    """Of the header Retry-After."""


class VideoServer:
    """Gives `answers` one after the other, or what `reply` makes of a request."""

    def __init__(self, reply: Callable[[dict[str, Any]], Answer] | None = None):
        self.about: dict[str, Any] | None = None
        self.status, self.answers, self.reply = 200, list[Answer](), reply
        self.asked, self.keys = list[dict[str, Any]](), list[str | None]()
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if outer.status != 200:
                    self.send(Answer(outer.status))
                elif outer.about is None:
                    self.send(Answer(405))
                else:
                    said = json.dumps(outer.about).encode()
                    self.send(Answer(200, said, kind="application/json"))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked.append(body)
                    outer.keys.append(self.headers["Authorization"])
                    answer = outer.reply(body) if outer.reply else outer.answers.pop(0)
                self.send(answer)

            def send(self, answer: Answer) -> None:
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.kind)
                self.send_header("Content-Length", str(len(answer.body)))
                if answer.after:
                    self.send_header("Retry-After", answer.after)
                self.end_headers()
                self.wfile.write(answer.body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/videos"

    def __enter__(self) -> "VideoServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
