"""The lazy FUSE file system over a snapshot."""
