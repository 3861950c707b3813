"""What users see: insights, and responses coloured by the reward of each token, on a terminal and on a page."""
