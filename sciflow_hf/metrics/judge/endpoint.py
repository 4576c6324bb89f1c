"""A judge behind an OpenAI-compatible server: POST {url}/chat/completions, images as data URLs."""

import base64
import io
import json
import logging
import random
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import requests
from PIL import Image

from ...errors import SciflowError, counted, first_line, printable
from .answers import SCHEMA, NoAnswerError, Question, read_answer
from .scoring import Answer

logger = logging.getLogger(__name__)

LONGEST_SIDE, JPEG_QUALITY = 1024, 85  # as published
MAX_TOKENS = 8192
TRIES, ANSWER_TRIES = 6, 2  # of a call that fails; of one whose answer cannot be read
GIVE_UP = 10  # calls that fail one after another, after which the server is taken to be down
LONGEST_WAIT = 60.0  # seconds, also where Retry-After says more
LARGEST_ANSWER = 2**20  # bytes

_BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_ENDS_THE_RUN = {
    401: "it does not accept the key",
    403: "it does not let this key in",
    404: "it has no such address or model",
    405: "this is not the address of an API",
    **dict.fromkeys((301, 302, 303, 307, 308), "it points to another address"),
}
_DISPENSABLE = ("temperature", "max_completion_tokens", "response_format")  # some servers refuse them


class Endpoint:
    """Asks a server. Threads may share it; once `stopped` is set no call is tried again.

    Args:
        url: address of the API, such as http://localhost:8000/v1.
        model: its name on the server.
        key: sent as bearer token; never shown or kept.
        timeout: seconds until a call is given up.
        max_calls: most calls, repeated ones included.
        sleep: waits so many seconds; by default until `stopped` at most.
        clock: seconds.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        *,
        timeout: float = 120.0,
        max_calls: int | None = None,
        sleep: Callable[[float], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise SciflowError(
                f"`judge_url` {parts.scheme}://{parts.hostname or ''}...: give an address such as "
                "https://api.example.org/v1, without a user or a key in it."
            )
        key = key.strip()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise SciflowError("The judge's key has characters that no key has: look at the environment variable.")
        if key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            logger.warning("`judge_url`: the key is sent to %s without encryption.", parts.hostname)
        self.url, self.model, self.timeout, self.max_calls = url.rstrip("/"), model, timeout, max_calls
        self.calls = 0
        self._failed = 0
        self.stopped = threading.Event()
        self._key, self._sleep, self._clock = key, sleep or self.stopped.wait, clock
        self._left_out: tuple[str, ...] = ()
        self._lock = threading.Lock()

    def __call__(self, question: Question) -> Answer:
        """The answer to a question.

        Raises:
            NoAnswerError: no usable answer after all tries.
            SciflowError: no call can succeed: the key, the address or the model is refused, or the server is down.
        """
        unreadable = 0
        for trial in range(TRIES):
            try:
                answer = self._ask(question)
                self._failed = 0
                return answer
            except _LaterError as error:
                reason, wait = str(error), error.wait
                if trial < TRIES - 1:
                    self._sleep(min(LONGEST_WAIT, 2**trial * (1 + random.random() / 4) if wait is None else wait))
                if self.stopped.is_set():
                    break
            except _UnreadableError as error:
                reason, unreadable = str(error), unreadable + 1
                if unreadable == ANSWER_TRIES:
                    self._failed = 0
                    break
        else:
            self._failed += 1
            if self._failed >= GIVE_UP:
                raise SciflowError(
                    f"The judge failed {GIVE_UP} times in a row, each after {TRIES} tries. {reason}. Run the same "
                    "command again when it answers: what it has answered is kept."
                )
        raise NoAnswerError(f"{reason} (tried {counted(trial + 1, 'time')})")

    def _ask(self, question: Question) -> Answer:
        with self._lock:
            if self.max_calls is not None and self.calls >= self.max_calls:
                raise NoAnswerError(f"`max_calls` {self.max_calls} are used up")
            self.calls += 1
            left_out = self._left_out
        body = {name: value for name, value in self._body(question).items() if name not in left_out}
        status, headers, text = self._post(body)
        if status == 200:
            try:
                return read_answer(_content(text))
            except NoAnswerError as error:
                raise _UnreadableError(str(error)) from None
            except (ValueError, LookupError, TypeError, AttributeError):
                kind = headers.get("Content-Type", "no content type")
                raise _UnreadableError(f"the server answered with {kind}: {text!r:.120}") from None
        said = f"{self.url} answered with status {status}: {printable(' '.join(text.split())):.200}"
        if status in _BUSY:
            raise _LaterError(said, _seconds(headers.get("Retry-After")))
        if status in _ENDS_THE_RUN:
            raise SciflowError(f"The judge cannot be asked, {_ENDS_THE_RUN[status]}. {said}")
        if status == 400 and (unwanted := next((n for n in _DISPENSABLE if n in body and n in text), "")):
            with self._lock:
                if unwanted not in self._left_out:
                    logger.warning("The judge's server refuses `%s`; it is asked without.", unwanted)
                self._left_out = (*self._left_out, unwanted)
            raise _LaterError(said, 0.0)
        raise NoAnswerError(said)

    def _body(self, question: Question) -> dict[str, Any]:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(image)}} for image in question.images()
        ]
        schema = {"name": "errors", "strict": True, "schema": SCHEMA}
        return {
            "model": self.model,
            "messages": [
                {"role": "system", "content": question.system},
                {"role": "user", "content": [*content, {"type": "text", "text": question.request}]},
            ],
            "temperature": 0,
            "max_completion_tokens": MAX_TOKENS,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }

    def _post(self, body: dict[str, Any]) -> tuple[int, Any, str]:
        """Status, headers and text of the answer, all of it within the time limit; redirections are not followed."""
        end = self._clock() + self.timeout
        try:
            with requests.post(
                f"{self.url}/chat/completions",
                json=body,
                auth=self._sign,
                timeout=self.timeout,
                allow_redirects=False,
                stream=True,
            ) as response:
                text = bytearray()
                for byte in response.iter_content(1):  # what has come; larger pieces would wait for more
                    text += byte
                    if self._clock() > end:
                        raise _LaterError(f"no answer within {self.timeout:g} s")
                    if len(text) > LARGEST_ANSWER:
                        raise _UnreadableError(f"the answer is larger than {LARGEST_ANSWER:,} bytes")
                said = text.decode("utf-8", errors="replace")
                return response.status_code, response.headers, self._without_key(said)
        except requests.Timeout:
            raise _LaterError(f"no answer within {self.timeout:g} s") from None
        except requests.RequestException as error:
            raise _LaterError(f"{self.url} cannot be reached: {first_line(error)}") from None

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """As `auth`, so that no password of a .netrc is sent."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _without_key(self, text: str) -> str:
        """Text of a server, which may repeat the key, without it."""
        return text.replace(self._key, "***") if self._key else text


class _LaterError(Exception):
    """Worth another try, after so many seconds if the server says so."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class _UnreadableError(Exception):
    """An answer that is none."""


def data_url(image: Image.Image) -> str:
    """An RGB image as a JPEG in a data URL, scaled down to 1024 pixels on its longest side if it is larger."""
    size, file = jpeg_size(*image.size), io.BytesIO()
    scaled = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
    scaled.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def jpeg_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of an image as it is sent."""
    scale = min(1.0, LONGEST_SIDE / max(width, height))
    return max(1, int(width * scale)), max(1, int(height * scale))


def _content(text: str) -> str:
    """The message of an answer in the API's form; parts of a list are joined, none is empty."""
    content = json.loads(text)["choices"][0]["message"].get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _seconds(retry_after: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds them or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        try:
            return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
        except ValueError:
            return None
