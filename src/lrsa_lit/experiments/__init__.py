"""Rows of settings run by ``lrsa fit`` and ``lrsa test``, their results, and what the results say."""
