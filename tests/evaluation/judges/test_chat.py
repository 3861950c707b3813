import asyncio
import contextlib
import gzip
import socket
import time
from contextlib import contextmanager
from threading import Thread

import pytest

pytest.importorskip("openai")

from qstar_jax.errors import InputError
from qstar_jax.evaluation.judges.chat import ChatServer
from qstar_jax.evaluation.judges.prompts import TEMPLATES

QUESTION = [{"role": "user", "content": TEMPLATES["tldr"].render("post", "longer one", "short")}]


def ask(server: ChatServer):
    async def one():
        async with server.connect() as send:
            return await send(QUESTION)

    return asyncio.run(one())


def test_a_reply_and_its_tokens(rule_server):
    reply = ask(ChatServer("rule", rule_server.url, max_tokens=77))
    assert reply.text.endswith('Preferred: "A"') and (reply.tokens_in, reply.tokens_out) == (100, 10)
    ((path, body, key),) = rule_server.requests
    assert path == "/v1/chat/completions" and key == "Bearer none"
    assert body == {"model": "rule", "messages": QUESTION, "temperature": 0.0, "max_tokens": 77}


def test_temperature_can_be_left_to_the_server(rule_server):
    ask(ChatServer("rule", rule_server.url, temperature=None))
    assert "temperature" not in rule_server.requests[0][1]


def test_the_key_comes_from_the_environment(rule_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = ChatServer("rule", rule_server.url)
    ask(server)
    assert rule_server.requests[0][2] == "Bearer secret"
    assert "secret" not in repr(server)


def test_the_hosted_interface_has_another_name_for_the_longest_reply(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert ChatServer("m").parameters == {"max_completion_tokens": 256, "temperature": 0.0}


def test_without_a_key_or_an_address_it_stops_at_once():
    with pytest.raises(InputError, match="variable OPENAI_API_KEY is not set"):
        ChatServer("m")


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://x/v1", "http://", "http://[x"])
def test_addresses_that_are_none(address):
    with pytest.raises(InputError, match=r"judge\.base_url"):
        ChatServer("m", address)


def test_no_key_in_the_address():
    with pytest.raises(InputError, match="holds a name or password") as error:
        ChatServer("m", "http://user:secret@localhost/v1")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_passing_failures_are_tried_again(status, rule_server):
    rule_server.faults = [status]
    began = time.perf_counter()
    assert ask(ChatServer("rule", rule_server.url, http_retries=1)).text
    assert len(rule_server.requests) == 2 and time.perf_counter() - began > 0.3


def test_tries_end(rule_server):
    rule_server.faults = [503] * 9
    with pytest.raises(RuntimeError, match=r"fails in 2 tries \(status 503\): .*out of order.* are kept"):
        ask(ChatServer("rule", rule_server.url, http_retries=1))
    assert len(rule_server.requests) == 2


@pytest.mark.parametrize("status", [400, 404, 422])
def test_wrong_requests_are_not_tried_again(status, rule_server):
    rule_server.faults = [status]
    with pytest.raises(InputError, match=rf"refuses the request \(status {status}\).*check judge\.model 'rule'"):
        ask(ChatServer("rule", rule_server.url))
    assert len(rule_server.requests) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_missing_or_refused(status, rule_server, monkeypatch):
    rule_server.faults = [status] * 2
    with pytest.raises(InputError, match=r"refuses the key .* set the variable OPENAI_API_KEY"):
        ask(ChatServer("rule", rule_server.url))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with pytest.raises(InputError, match="set OPENAI_API_KEY to a key that it accepts") as error:
        ask(ChatServer("rule", rule_server.url))
    assert "secret" not in str(error.value)


def test_a_server_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(InputError, match=r"cannot be reached in one try .*is it running\? See judge\.base_url"):
        ask(ChatServer("m", address, http_retries=0))


def test_a_server_that_is_too_slow(chat_server):
    with (
        chat_server(lambda body: time.sleep(1) or (200, b"{}")) as server,
        pytest.raises(RuntimeError, match="within 0"),
    ):
        ask(ChatServer("m", server.url, http_retries=0, timeout=0.2))


@pytest.mark.parametrize("body", [b'"hello"', b"{}", b"<html>"])
def test_a_server_of_something_else(body, chat_server):
    with chat_server(lambda _: (200, body)) as server, pytest.raises(InputError, match="usually ends in /v1"):
        ask(ChatServer("m", server.url, http_retries=0))


def test_a_reply_without_words(chat_server):
    body = b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": null}}]}'
    with chat_server(lambda _: (200, body)) as server:
        assert ask(ChatServer("m", server.url)).text == ""


@contextmanager
def raw_server(*pieces: bytes, rest: bytes = b""):
    """A server that writes pieces, and then `rest` for ever, slowly if it is short."""

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(2**16)
                    for piece in pieces:
                        connection.sendall(piece)
                    while rest:
                        connection.sendall(rest)
                        time.sleep(0.02 if len(rest) < 100 else 0)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        listener.shutdown(socket.SHUT_RDWR)


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
MEGABYTE = b'{"choices": "' + b"a" * 2**20


@pytest.mark.parametrize(
    ("pieces", "rest", "message"),
    [
        ((OK + b"Content-Length: 52428800\r\n\r\n", *[MEGABYTE] * 50), b"", "sends more than 4 MiB"),
        ((OK + b"\r\n",), MEGABYTE, "sends more than 4 MiB"),
        ((OK + b"Content-Encoding: gzip\r\n\r\n", gzip.compress(b" " * 2**24)), b"", "sends more than 4 MiB"),
        ((OK + b"\r\n",), b" ", "did not reply within 1 s in one try"),
        ((OK, b"X: "), b"a", "did not reply within 1 s|cannot be reached|headers"),
        ((), b"", "cannot be reached in one try"),
        ((b"\0" * 5000,), b"", "cannot be reached in one try"),
        ((b"HTTP/1.1 302 Found\r\nLocation: /v1\r\nContent-Length: 0\r\n\r\n",), b"", "edirect"),
        ((OK + b"Content-Length: 0\r\n\r\n",), b"", "usually ends in /v1"),
        ((OK + b"Content-Length: 9\r\n\r\n{}",), b"", "cannot be reached in one try"),
        ((OK + b"Content-Length: 4\r\n\r\nnull",), b"", "usually ends in /v1"),
        ((OK + b"Content-Length: 2\r\n\r\n\xff\xfe",), b"", "usually ends in /v1"),
        *(
            ((OK + b"Content-Length: %d\r\n\r\n%b" % (len(body), body),), b"", "usually ends in /v1")
            for body in (
                b"[]",
                b"17",
                b'{"choices": 5}',
                b'{"choices": [5]}',
                b'{"choices": [{"message": null}]}',
                b'{"choices": [{"message": {"content": 5}}]}',
                b'{"choices": [{"message": {"content": "A"}}], "usage": 3}',
                b'{"choices": [{"message": {"content": "A"}}], "usage": {"prompt_tokens": "x"}}',
                b"[" * 100_000,
            )
        ),
    ],
)
def test_a_server_of_garbage(pieces, rest, message):
    began = time.perf_counter()
    with raw_server(*pieces, rest=rest) as url, pytest.raises((InputError, RuntimeError), match=message):
        ask(ChatServer("m", url, http_retries=0, timeout=1.0))
    assert time.perf_counter() - began < 20
