"""The Grafana dashboard asks for metrics that exist."""

import json
import re

from sarathi_jax.telemetry.metrics import Metrics


def test_every_query_names_a_metric(repo):
    dashboard = json.loads((repo / "configs" / "grafana" / "sarathi_jax.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"sarathi_\w+", query)}
    families = {(family.name, family.type) for family in Metrics("tiny").registry.collect()}
    exist = {f"{name}_total" if kind == "counter" else name for name, kind in families}
    exist |= {f"{name}_bucket" for name, kind in families if kind == "histogram"}
    assert asked <= exist, asked - exist
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) == 12
