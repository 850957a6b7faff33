"""Packages: archives of conda and PyPI, and interpreters, turned into trees."""
