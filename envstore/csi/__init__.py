"""The Container Storage Interface driver: a snapshot as a volume in a pod spec.

This part parses, checks and records; whatever takes privileges (serving FUSE, mounting) is done
by the node server (``envstore.fuse.node``), a process of its own that outlives this one.
"""
