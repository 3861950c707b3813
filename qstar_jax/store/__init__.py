"""Everything on disk: model folders, checkpoints and caches, and identities that tell when they are stale."""
