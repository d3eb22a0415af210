"""The live page in a real browser, with a server process behind it that is under load."""

import shutil
import threading
import time

import httpx
import pytest
from playwright.sync_api import Page, sync_playwright

from tests.server.processes import Process

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def page(server: Process):
    if CHROMIUM is None:
        pytest.skip("no Chromium here: install the system's package")
    with sync_playwright() as playwright:
        # The sandbox of Chromium does not run as root, which test machines often are.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 900})
        yield page
        browser.close()


HEADERS = {"Authorization": "Bearer key"}


def open_page(page: Page, server: Process) -> None:
    """The page asks for the key, and with it shows what is served."""
    page.goto(server.url)
    page.wait_for_selector("#key", state="visible")
    page.fill("#key", "key")
    page.wait_for_function("document.getElementById('model').textContent == 'tiny'")


def metric(server: Process, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).rsplit(" ", 1)[1])


def load(server: Process, num_clients: int, num_each: int) -> list[threading.Thread]:
    """Clients that ask one question after another."""

    def ask(client: int) -> None:
        for i in range(num_each):
            body = {"model": "tiny", "prompt": [5 + client, 6, 7 + i] * 20, "max_tokens": 40, "ignore_eos": True}
            assert httpx.post(f"{server.url}/v1/completions", json=body, headers=HEADERS, timeout=60).status_code == 200

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(num_clients)]
    for thread in threads:
        thread.start()
    return threads


def number(page: Page, selector: str) -> float:
    return float(page.inner_text(selector).split()[0])


def test_the_page_shows_what_the_metrics_say(server, page, tmp_path):
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    threads = load(server, 6, 8)
    open_page(page, server)
    page.wait_for_function("document.getElementById('link').textContent == 'live'")
    page.wait_for_function("Number(document.getElementById('running').textContent) > 0")
    page.wait_for_function("document.getElementById('tbt').textContent.endsWith('ms')")
    page.screenshot(path=tmp_path / "page.png")
    for thread in threads:
        thread.join()
    time.sleep(1.5)  # two polls

    assert page.inner_text("#model") == "tiny"
    assert number(page, "#requests-more") == metric(server, 'sarathi_requests_total{reason="length"}')
    assert number(page, "#running") == metric(server, 'sarathi_running{replica="0"}') == 0
    assert number(page, "#blocks-more") == metric(server, 'sarathi_blocks{replica="0",state="owned"}')
    live = httpx.get(f"{server.url}/live", headers=HEADERS).json()
    assert f"P50 {live['tbt_ms']['p50']:.1f}" in page.inner_text("#tbt-more")
    shown = page.evaluate("steps.at(-1)")
    assert shown == live["steps"][-1]
    assert not errors
    assert all(url.startswith((server.url, "data:")) for url in requests), "nothing from elsewhere"


def test_the_playground_streams(server, page):
    open_page(page, server)
    page.fill("#prompt", "the quick brown fox")
    page.fill("#max-tokens", "24")
    page.fill("#temperature", "0")
    page.click("#go")
    page.wait_for_function(
        "document.getElementById('answer-more').textContent.startsWith('first token')", timeout=30_000
    )
    body = {"model": "tiny", "prompt": "the quick brown fox", "max_tokens": 24, "temperature": 0}
    text = httpx.post(f"{server.url}/v1/completions", json=body, headers=HEADERS).json()["choices"][0]["text"]
    assert page.evaluate("document.getElementById('answer').textContent") == "the quick brown fox" + text


def test_the_playground_tells_errors(server, page):
    open_page(page, server)
    page.fill("#max-tokens", "0")
    page.evaluate("document.getElementById('form').noValidate = true")
    page.click("#go")
    page.wait_for_function("document.getElementById('answer-more').textContent.includes('max_tokens')")
