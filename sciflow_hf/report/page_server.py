"""Serves the page of a folder on this machine, and follows what is written into the folder."""

import functools
import hashlib
import mimetypes
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..errors import SciflowError
from .page import UNREAD, UNREADABLE, embedded, served_html, thumbnail
from .page_data import page_of

ADDRESS = "127.0.0.1"
SECONDS = 5.0
"""How often an open page asks for new data."""
_HOSTS = ("127.0.0.1", "localhost")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_small = functools.lru_cache(maxsize=4000)(lambda file, version: thumbnail(file))


class PageServer(ThreadingHTTPServer):
    """Serves the page of a folder, the images that the page names, and nothing else.

    The folder is read again whenever the page or its data is asked for. Requests whose `Host` is another name than this
    machine's are refused: another site's name may be made to point here.

    Args:
        folder: of a training or an evaluation.
        port: 0 takes any that is free.

    Raises:
        SciflowError: the folder has no page, see `page_of`, or the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: str | Path, port: int = 0) -> None:
        self.folder = Path(folder)
        self.page = page_of(folder)
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise SciflowError(
                f"`port` {port}: cannot be used ({error.strerror}). Give another one, or 0 for any that is free."
            ) from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version, sys_version = "sciflow-hf", ""

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in _HOSTS:
            return self._answer(HTTPStatus.MISDIRECTED_REQUEST, f"This page is at {self.server.url} only.\n".encode())
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        try:
            if path in ("", "data.json"):
                page = self.server.page = page_of(self.server.folder)
                if path:
                    return self._data(embedded(page.document()).encode())
                return self._answer(HTTPStatus.OK, served_html(page, SECONDS).encode(), "text/html; charset=utf-8")
            named = {picture.path: picture.version for picture in self.server.page.pictures()}
            if path.removeprefix("thumbnails/") in named:
                return self._image(path, named)
        except SciflowError as error:
            return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())
        except UNREADABLE:
            return self._answer(HTTPStatus.NOT_FOUND, f"{path} {UNREAD}.\n".encode())
        return self._answer(HTTPStatus.NOT_FOUND, b"The page names no such file.\n")

    def _data(self, body: bytes) -> None:
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        if self.headers.get("If-None-Match") == tag:
            return self._answer(HTTPStatus.NOT_MODIFIED, b"", "application/json", {"ETag": tag})
        return self._answer(HTTPStatus.OK, body, "application/json", {"ETag": tag})

    def _image(self, path: str, named: Mapping[str, int]) -> None:
        if path in named:
            kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
            return self._answer(HTTPStatus.OK, (self.server.folder / path).read_bytes(), kind)
        file = path.removeprefix("thumbnails/")
        return self._answer(HTTPStatus.OK, _small(self.server.folder / file, named[file]), "image/webp")

    def _answer(
        self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8", more: Mapping[str, str] = {}
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **_HEADERS, **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a request every few seconds is no news."""
