"""Fixtures of the pretended cloud."""

from cloudkit import checkout, cloud  # noqa: F401  # fixtures
