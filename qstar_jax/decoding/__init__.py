"""Answers from a model: greedy, sampled, or searched with beams, all over a cache of fixed length."""

from qstar_jax.decoding.beam import beam_search as beam_search
from qstar_jax.decoding.hypotheses import Hypotheses as Hypotheses
from qstar_jax.decoding.sampling import sample as sample
