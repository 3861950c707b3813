"""Everything on disk: model folders, checkpoints, caches, and the identity of what made them."""
