"""The live page: what it asks for, and in a real browser what it shows."""

import httpx

from sarathi_jax.server.page import page_router
from sarathi_jax.telemetry.live import LiveView
from sarathi_jax.telemetry.metrics import Metrics
from tests.server.running import with_server


def test_the_page_needs_nothing_from_elsewhere(tiny):
    async def talk(client: httpx.AsyncClient, front):
        page = await client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "http://" not in page.text.replace("http://www.w3.org", "")
        assert "https://" not in page.text
        return (await client.get("/live")).json()

    live = with_server(tiny, talk, routers=[page_router(LiveView(tbt_slo_ms=80))])
    assert (live["steps"], live["num_steps"], live["tbt_slo_ms"], live["tbt_ms"]) == ([], 0, 80, {"count": 0})


def test_the_numbers_are_those_of_the_metrics(tiny):
    bench, view, metrics = tiny.bench(), LiveView(), Metrics("tiny")
    bench.engine.observe(view)
    bench.engine.observe(metrics.observer(0))

    async def talk(client: httpx.AsyncClient, front):
        for prompt in ("a b c", [5, 6, 7, 8]):
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 9, "ignore_eos": True, "temperature": 0}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
        live = (await client.get("/live")).json()
        later = (await client.get(f"/live?since={live['num_steps'] - 2}")).json()
        return live, later, (await client.get("/metrics")).text

    app = {"routers": [page_router(view)], "metrics": metrics.text}
    live, later, text = with_server(tiny, talk, bench=bench, **app)
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert live["totals"]["output_tokens"] == float(values["sarathi_output_tokens_total"]) == 18
    assert live["totals"]["prefill_tokens"] == float(values['sarathi_step_tokens_total{kind="prefill",replica="0"}'])
    assert live["num_steps"] == float(values['sarathi_step_seconds_count{bucket="16",replica="0"}'])
    assert live["tbt_ms"]["count"] == float(values["sarathi_tbt_seconds_count"]) == 16
    assert live["ttft_ms"]["count"] == float(values["sarathi_ttft_seconds_count"]) == 2
    assert live["free_blocks"] == float(values['sarathi_blocks{replica="0",state="free"}'])
    assert sum(step["decodes"] for step in live["steps"]) == 16
    assert len(later["steps"]) == 2
