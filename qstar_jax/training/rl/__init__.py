"""Training on a reward: the policy's own samples, what they earn, and the steps that follow."""
