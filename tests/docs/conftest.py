from cli_helpers import elsewhere  # noqa: F401 - for all tests of this folder
