"""A language model behind an OpenAI-compatible HTTP interface: a paid one, or a server on this machine."""

import asyncio
import importlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from qstar_jax.errors import InputError
from qstar_jax.evaluation.judges.replies import Messages, Reply

KEY = "OPENAI_API_KEY"  # the only place from which a key is taken; it is never stored
_NO_KEY = "none"  # local servers need no key, but the client requires a string
_MAX_REPLY = 2**22  # bytes; a reply of 100,000 tokens has a tenth of it
_ON_ITS_WAY = ("content-encoding", "content-length", "transfer-encoding")  # headers of what was decoded
_KEPT = "earlier replies are kept, so the same command continues from there"


@dataclass(frozen=True)
class ChatServer:
    """A model and where it is served.

    Args:
        model: Its name at the server.
        base_url: Address of the interface, such as http://localhost:8000/v1; None: the client's default.
        temperature: Sampling temperature; None: the server's default.
        max_tokens: Longest reply, in tokens.
        http_retries: Further tries of a request that fails on its way, or with status 408, 409, 429 or 500 and above.
            Between them the client waits 0.5, 1, 2, 4, 8, 8, ... seconds, or as long as the server asks, up to 2
            minutes.
        timeout: Seconds that a request may take.

    Raises:
        InputError: If the package `openai` or the key is missing, or the address is invalid.
    """

    model: str
    base_url: str | None = None
    temperature: float | None = 0.0
    max_tokens: int = 256
    http_retries: int = 5
    timeout: float = 120.0

    def __post_init__(self):
        """Checks what can be known before a call."""
        _openai()
        if self.base_url is not None:
            try:
                parts = urlsplit(self.base_url)
            except ValueError as error:
                raise InputError(f"judge.base_url {self.base_url!r}: not an address ({error})") from error
            if "@" in parts.netloc:
                raise InputError(f"judge.base_url holds a name or password; give the key by the variable {KEY} instead")
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise InputError(
                    f"judge.base_url {self.base_url!r}: expected an address such as http://localhost:8000/v1"
                )
        elif not os.environ.get(KEY) and not os.environ.get("OPENAI_BASE_URL"):
            raise InputError(
                f"judge.model {self.model!r} needs a key, and the environment variable {KEY} is not set; set it, or "
                "name a server that needs none by judge.base_url"
            )

    @property
    def address(self) -> str:
        """Where requests go."""
        return str(self._client().base_url)

    @property
    def parameters(self) -> dict[str, Any]:
        """Sampling parameters, by their names in the interface."""
        host = urlsplit(self.address).hostname or ""
        # OpenAI's newer models refuse the old name, which is the only one that other servers know.
        hosted = host.endswith((".openai.com", ".azure.com"))
        parameters = {"max_completion_tokens" if hosted else "max_tokens": self.max_tokens}
        return parameters if self.temperature is None else parameters | {"temperature": self.temperature}

    def _client(self):
        limits = {"max_retries": self.http_retries, "timeout": self.timeout}
        client = _limited_client(self.timeout)
        return _openai().AsyncOpenAI(
            api_key=os.environ.get(KEY) or _NO_KEY, base_url=self.base_url, http_client=client, **limits
        )

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Callable[[Messages], Awaitable[Reply]]]:
        """Opens connections.

        Yields:
            A function that sends a conversation and returns the reply. It raises InputError where the user can mend
            what is wrong, and RuntimeError where the server fails in spite of all tries.
        """
        openai, parameters = _openai(), self.parameters

        async def ask(messages: Messages) -> Reply:
            try:
                completion = await client.chat.completions.create(
                    model=self.model, messages=list(messages), **parameters
                )
            except openai.APIError as error:
                raise self._sentence(error) from error
            except _TooLongError as error:
                raise InputError(
                    f"the judge's server {self.address} sends more than {_MAX_REPLY >> 20} MiB in one reply; see "
                    f"judge.base_url; {_KEPT}"
                ) from error
            except (ValueError, RecursionError) as error:  # it says that it sends JSON, and does not
                raise self._no_interface(str(error)) from error
            return self._read(completion)

        async with self._client() as client:
            yield ask

    def _read(self, completion: Any) -> Reply:
        try:
            text = completion.choices[0].message.content if completion.choices else None
            usage = completion.usage
            counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
        except (AttributeError, TypeError, LookupError) as error:  # the client does not check what it was sent
            raise self._no_interface(str(completion)) from error
        if completion.choices is None or not isinstance(text or "", str) or not all(map(_is_count, counts)):
            raise self._no_interface(str(completion))
        return Reply(text or "", *counts)

    def _no_interface(self, reply: str) -> InputError:
        return InputError(
            f"{self.address} does not answer as a chat interface (found: {reply[:80]!r}); judge.base_url usually "
            "ends in /v1"
        )

    def _sentence(self, error: Exception) -> InputError | RuntimeError:
        openai, where = _openai(), f"the judge's server {self.address}"
        tries = f"in {self.http_retries + 1} tries" if self.http_retries else "in one try"
        if isinstance(error, openai.APITimeoutError):
            return RuntimeError(f"{where} did not reply within {self.timeout:g} s {tries} (judge.timeout); {_KEPT}")
        if isinstance(error, openai.APIConnectionError):
            reason = error.__cause__ or error
            return InputError(
                f"{where} cannot be reached {tries} ({reason}); is it running? See judge.base_url; {_KEPT}"
            )
        if not isinstance(error, openai.APIStatusError):
            return RuntimeError(f"{where}: {error}; {_KEPT}")
        status, message = error.status_code, str(error.message)[:300]
        if status in (401, 403):  # what the server says here may repeat a part of the key
            fix = f"set {KEY} to a key that it accepts" if os.environ.get(KEY) else f"set the variable {KEY}"
            return InputError(f"{where} refuses the key (status {status}); {fix}")
        if status in (408, 409, 429) or status >= 500:
            return RuntimeError(f"{where} fails {tries} (status {status}): {message}; {_KEPT}")
        return InputError(
            f"{where} refuses the request (status {status}): {message}; check judge.model {self.model!r}, "
            "judge.base_url (usually ends in /v1), judge.temperature and judge.max_tokens"
        )


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and value >= 0)


class _TooLongError(BaseException):
    """A reply exceeds the limit; no Exception, after any of which the client would send the request again."""


def _limited_client(seconds: float) -> Any:
    """Makes a client for which a reply, whole, has limits on time and size; its own are per piece, and on time only."""
    default = _openai().DefaultAsyncHttpxClient
    library = importlib.import_module(default.__bases__[0].__module__.partition(".")[0])  # httpx, or what follows it

    class LimitedClient(default):
        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            try:
                async with asyncio.timeout(seconds):
                    response = await super().send(request, stream=True, **options)
                    content = await _content(response)
            except TimeoutError as error:
                raise library.ReadTimeout("", request=request) from error  # which may be tried again
            headers = {name: value for name, value in response.headers.items() if name not in _ON_ITS_WAY}
            return library.Response(response.status_code, headers=headers, content=content, request=request)

    return LimitedClient()


async def _content(response: Any) -> bytes:
    content = bytearray()
    try:
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > _MAX_REPLY:
                raise _TooLongError
    finally:
        await response.aclose()
    return bytes(content)


def _openai():
    try:
        import openai
    except ImportError as error:
        raise InputError(
            "a judge of kind llm needs the package openai, which is not installed: pip install 'qstar_jax[judge]'"
        ) from error
    return openai
