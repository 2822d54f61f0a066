"""Studies, sweeps and comparisons: settings run by ``lrsa fit`` and ``lrsa test``, their results and reports."""
