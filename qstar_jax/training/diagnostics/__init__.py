"""Diagnostics of a run: memory, its first loss, what was not finite, whether chosen rewards fall as expected."""
