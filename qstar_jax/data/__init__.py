"""Reads files of preferences, tokenizes them, and packs them into batches."""
