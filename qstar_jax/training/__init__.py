"""Supervised fine-tuning and direct preference optimisation, on one device or many."""
