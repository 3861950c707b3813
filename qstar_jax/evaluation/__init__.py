"""What a trained model thinks, measured: rewards of single tokens."""
