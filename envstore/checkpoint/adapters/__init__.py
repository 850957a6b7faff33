"""Envstore checkpoints where other frameworks expect theirs."""
