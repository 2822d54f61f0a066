"""The reports are of a tiny study."""

from study.conftest import data, results, study_file

__all__ = ["data", "results", "study_file"]
