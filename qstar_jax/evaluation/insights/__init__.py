"""The three insights of the paper, one file each."""
