"""Checkpoints that survive: staged in memory, persisted by a process of their own, restored."""
