"""What a reader sees: responses coloured by the reward of each token, on a terminal and on a page."""
