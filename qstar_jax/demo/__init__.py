"""A small summarisation task with a known reward, a base model of its language, and a tour of the paper on it."""
