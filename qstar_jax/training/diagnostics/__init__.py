"""What watches a run: its estimate, what was not finite, and whether chosen rewards move as theory expects."""
