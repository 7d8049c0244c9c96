"""Measurements, not installed with the package: `python -m bench` in the root of the checkout."""
