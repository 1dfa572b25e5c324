"""Fixtures for benchmarks: small models and a data module without files."""

from small_models import adaptive, make, measured, methods, one_thread  # noqa: F401
