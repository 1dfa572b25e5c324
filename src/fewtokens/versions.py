"""Versions of installed packages."""

from importlib.metadata import PackageNotFoundError, version


def version_of(name: str) -> str | None:
    """Return the version of an installed package; None if it is not installed, as this one with PYTHONPATH=src."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
