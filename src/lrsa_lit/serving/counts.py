"""The folder in which the processes of a server keep their Prometheus metrics."""

from __future__ import annotations

import os
import tempfile


def share_counts() -> tempfile.TemporaryDirectory[str]:
    """Make a temporary folder for the metrics of all processes. Call it before ``prometheus_client`` is imported."""
    folder = tempfile.TemporaryDirectory(prefix="lrsa-serve-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder.name
    return folder
