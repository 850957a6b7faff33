"""The content-addressed store: chunks, frames, packs, manifests, snapshots and refs."""
