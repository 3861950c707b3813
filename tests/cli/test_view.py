"""`qstar view`: the page, its application, and who may ask it."""

import shutil
import socket
import threading
import time

import pytest

import qstar_jax as qstar
from qstar_jax.cli.main import main
from qstar_jax.cli.view import make_app
from qstar_jax.config import ViewConfig
from qstar_jax.report.numbers import signed

testclient = pytest.importorskip("starlette.testclient", reason="needs the extra `view`")
pytest.importorskip("python_multipart", reason="needs the extra `view`")


@pytest.fixture(scope="module")
def model(dpo_run):
    return qstar.load(dpo_run)


@pytest.fixture(scope="module")
def client(model):
    app = make_app(model, ViewConfig(model.source, beams=3, max_new_tokens=4, alternatives=2))
    return testclient.TestClient(app, base_url="http://127.0.0.1")


def test_the_page_begins_with_a_form(client):
    page = client.get("/")
    assert page.status_code == 200 and page.text.count("<textarea") == 2 and "Search with 3 beams" in page.text
    assert "as a chat" not in page.text and 'class="tokens' not in page.text


def test_what_is_typed_is_scored(client, model):
    page = client.post("/", data={"prompt": "w1 w2", "response": "w3 w4", "score": "1"}).text
    [scored] = model.score("w1 w2", "w3 w4", alternatives=2)
    assert f"{scored.total_reward:+.3f}".replace("-", "\N{MINUS SIGN}") in page
    assert page.count('class="t') >= 3 and page.count("most likely here") == 3
    assert "w1 w2</textarea>" in page  # what was typed stays


def test_beams_are_shown_and_can_be_scored(client, model):
    page = client.post("/", data={"prompt": "w1 w2", "beams": "1"}).text
    [answers] = model.generate("w1 w2", beams=3, return_sequences=3, max_new_tokens=4)
    assert len(answers) == 3 and page.count("Score it") == sum(bool(answer.text.strip()) for answer in answers) > 0
    assert all(answer.text in page and signed(answer.logp, 2) in page for answer in answers)


def test_text_is_escaped(client):
    page = client.post("/", data={"prompt": "<script>alert(1)</script>", "response": "w1 </textarea><b>", "score": "1"})
    assert "<script>alert" not in page.text and "<b>" not in page.text


def test_what_cannot_be_scored_is_said(client):
    page = client.post("/", data={"prompt": "w1", "response": "", "score": "1"})
    assert page.status_code == 400 and "empty response" in page.text and 'role="alert"' in page.text


def test_only_names_of_this_machine_are_answered(client):
    assert client.get("/", headers={"host": "example.org"}).status_code == 400
    assert client.get("/", headers={"host": "localhost:8000"}).status_code == 200


def test_a_port_that_is_taken_is_named(dpo_run, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["view", str(dpo_run), "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another, or 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_it_works_in_a_browser(width, model):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("no chromium on the path")
    import uvicorn

    config = ViewConfig(model.source, beams=2, max_new_tokens=4)
    server = uvicorn.Server(uvicorn.Config(make_app(model, config), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 800})
        complaints = []
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(f"http://127.0.0.1:{port}/")
        page.fill("#prompt", "w1 w2")
        page.click("text=Search with 2 beams")
        page.click("text=Score it >> nth=0", timeout=60_000)
        page.wait_for_selector(".t", timeout=60_000)
        page.hover(".t >> nth=0")
        assert "log π" in page.inner_text("#tip")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert complaints == []
        browser.close()
    server.should_exit = True
    thread.join(30)
