"""From a file of preferences to batches of token ids: read, split, tokenise, batch, look."""
