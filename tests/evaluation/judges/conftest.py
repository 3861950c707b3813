"""Servers on loopback: one that judges by a plain rule, at once, and a real model behind a proxy that counts."""

import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

REAL_MODEL = os.environ.get("QSTAR_REAL_MODEL", "")


class ChatHandler(BaseHTTPRequestHandler):
    """Counts requests, and gives the server's faults, a status each, before it answers."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with server.lock:
            server.requests.append((self.path, json.loads(body), self.headers.get("Authorization")))
            server.inside += 1
            server.peak = max(server.peak, server.inside)
            fault = server.faults.pop(0) if server.faults else None
        try:
            status, reply = (fault, b'{"error": {"message": "out of order"}}') if fault else server.answer(body)
        finally:
            with server.lock:  # before the client can know of the reply
                server.inside -= 1
                server.served += [] if fault else [(body, reply)]
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


class ChatHttp(ThreadingHTTPServer):
    """`answer(body)` returns (status, bytes)."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.answer, self.lock = answer, threading.Lock()
        self.requests, self.faults, self.served, self.inside, self.peak = [], [], [], 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def serving(answer):
    server = ChatHttp(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def judge_by_length(body: bytes) -> tuple[int, bytes]:
    """Prefers the longer summary; where one says "riddle", names no letter at first, or "riddles" never."""
    messages = json.loads(body)["messages"]
    question = messages[0]["content"]
    a, b = re.search(r"Summary A:\n(.*?)\n\nSummary B:\n(.*?)\n\nFIRST", question, re.S).groups()
    text = f'Comparison: One is longer.\nPreferred: "{"A" if len(a) > len(b) else "B"}"'
    if "riddles" in question or ("riddle" in question and len(messages) == 1):
        text = "Comparison: A or B, who knows?"
    time.sleep(0.03)  # so that calls meet each other
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "rule", "choices": [choice], "usage": usage}
    return 200, json.dumps(reply).encode()


class Recorder(Console):
    """A console that keeps its lines."""

    def __init__(self, **options):
        super().__init__(file=io.StringIO(), **options)

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


@pytest.fixture
def recorder():
    """A console with its `lines`."""
    return Recorder()


@pytest.fixture
def rule_server():
    """A server that prefers the longer summary (`judge_by_length`)."""
    with serving(judge_by_length) as server:
        yield server


@pytest.fixture
def chat_server():
    """`with chat_server(answer) as server`: a server of one's own rule."""
    return serving


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    """No key of whoever runs the tests is ever sent."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def model_server(tmp_path_factory):
    """`transformers serve` of the real model; yields its address and its process."""
    pytest.importorskip("torch")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", REAL_MODEL]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    # Two calls at once would otherwise have four threads wait for each other on two cores.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        _await_health(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.terminate()
        process.wait(30)


def _await_health(address: str, process: subprocess.Popen, log: Path):
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the server does not start: {log.read_text()}")


@pytest.fixture
def proxy(model_server):
    """A proxy before the real model that counts calls and can fail."""

    def forward(body: bytes) -> tuple[int, bytes]:
        address = f"{model_server[0]}/chat/completions"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    with serving(forward) as server:
        yield server
