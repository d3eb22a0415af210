"""Who watches the engine: metrics for Prometheus, a trace for Perfetto, the live page's numbers."""
