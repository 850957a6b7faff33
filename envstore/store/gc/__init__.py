"""Garbage collection: what nothing leads to is found, condemned, and in the end deleted."""
