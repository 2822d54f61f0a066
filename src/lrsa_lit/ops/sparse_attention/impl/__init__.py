"""Implementations of the operator. They share ``geometry`` and ``selection`` and never import one another."""
