"""Where the processes of a server count for Prometheus."""

from __future__ import annotations

import os
import tempfile


def share_counts() -> tempfile.TemporaryDirectory[str]:
    """A folder for the counts of all processes, made known to them: before ``prometheus_client`` is imported."""
    folder = tempfile.TemporaryDirectory(prefix="lrsa-serve-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder.name
    return folder
