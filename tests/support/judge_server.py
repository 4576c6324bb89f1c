"""An OpenAI-compatible server on the loopback interface that answers by a script, and misbehaves as it is told."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = '{"errors": [{"d": "Missing: decoder", "s": "critical"}], "broken": false}'


class JudgeServer:
    """Answers call after call by `script`, the last entry for ever.

    An entry is the text of a message, (status, headers, body), "hang" (silence until `close`), "drop" (the connection
    is closed), "trickle" (a byte every time `tick` returns), or a function of the request's body that gives one.

    Attributes:
        requests: (path, headers, body) of each call.
    """

    def __init__(self, *script: Any, tick: Callable[[], None] = lambda: None) -> None:
        self.script, self.tick = list(script), tick
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.at_once, self.most_at_once = 0, 0
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"judge": self}))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def close(self) -> None:
        self.closed.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@contextmanager
def serving(*script: Any, **options: Any) -> Iterator[JudgeServer]:
    server = JudgeServer(*script, **options)
    try:
        yield server
    finally:
        server.close()


class _Handler(BaseHTTPRequestHandler):
    judge: JudgeServer

    def do_POST(self) -> None:
        judge = self.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.requests.append((self.path, dict(self.headers), body))
            entry = judge.script.pop(0) if len(judge.script) > 1 else judge.script[0]
            judge.at_once += 1
            judge.most_at_once = max(judge.most_at_once, judge.at_once)
        try:
            self.act(entry(body) if callable(entry) else entry)
        except OSError:  # the client has gone
            pass
        finally:
            with judge.lock:
                judge.at_once -= 1

    def act(self, entry: Any) -> None:
        if entry == "hang":
            self.judge.closed.wait()
        elif entry == "drop":
            self.connection.close()
        elif entry == "trickle":
            self.head(200, {"Content-Length": "1000000"})
            while not self.judge.closed.is_set():
                self.judge.tick()
                self.wfile.write(b" ")
        else:
            if isinstance(entry, str):
                choice = {"index": 0, "message": {"role": "assistant", "content": entry}, "finish_reason": "stop"}
                entry = (200, {"Content-Type": "application/json"}, json.dumps({"choices": [choice]}))
            status, headers, text = entry
            self.head(status, {"Content-Length": str(len(text.encode())), **headers})
            self.wfile.write(text.encode())

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass
