"""The server's Prometheus metrics. Each process counts for itself, and ``/metrics`` shows the totals.

``PROMETHEUS_MULTIPROC_DIR`` must be a folder that all processes share, set before this module is imported.
"""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

REQUESTS = Counter("lrsa_requests", "Chat completions by HTTP status", ["status"])
PROMPT_TOKENS = Counter("lrsa_prompt_tokens", "Prompt tokens of answered requests")
CACHED_TOKENS = Counter("lrsa_cached_tokens", "Prompt tokens that were restored from snapshots")
COMPLETION_TOKENS = Counter("lrsa_completion_tokens", "Generated tokens")
FIRST_TOKEN = Histogram("lrsa_first_token_seconds", "Seconds from a request to its first token", buckets=_SECONDS)
TOKEN = Histogram("lrsa_token_seconds", "Mean seconds per further token of an answer", buckets=_SECONDS)
WAITING = Gauge("lrsa_waiting", "Requests waiting for a worker", multiprocess_mode="mostrecent")
ROWS = Gauge("lrsa_rows", "Answers being decoded", multiprocess_mode="livesum")
READING = Gauge("lrsa_reading", "Prompts being read", multiprocess_mode="livesum")
RESERVED = Gauge("lrsa_reserved_bytes", "Bytes reserved for caches of admitted requests", multiprocess_mode="livesum")
SNAPSHOTS = Gauge("lrsa_snapshot_bytes", "Bytes used by snapshots", multiprocess_mode="livesum")
FORMAT = CONTENT_TYPE_LATEST


def shown() -> bytes:
    """The metrics of all processes in Prometheus' text format."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return generate_latest(registry)
