"""What a reader sees: answers coloured by the reward of each token, on a terminal and on a page."""
