"""The three insights of the paper, and what it expects of dialogues; one file each."""
