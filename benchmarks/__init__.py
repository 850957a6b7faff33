"""Measures envstore beside the tools people use today: ``python -m benchmarks``."""
