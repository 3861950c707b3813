"""Responses from a model, sampled or searched for; every search is a setting of one scored core."""

from qstar_jax.decoding.best_of_n import Rejection as Rejection
from qstar_jax.decoding.best_of_n import best_of_n as best_of_n
from qstar_jax.decoding.responses import Responses as Responses
from qstar_jax.decoding.sampler import sample as sample
from qstar_jax.decoding.sampling import SampleOptions as SampleOptions
from qstar_jax.decoding.search.beam import beam_search as beam_search
from qstar_jax.decoding.search.beam_options import BeamOptions as BeamOptions
from qstar_jax.decoding.search.chunks import ChunkOptions as ChunkOptions
from qstar_jax.decoding.search.chunks import chunk_beam_search as chunk_beam_search
from qstar_jax.decoding.search.exact import exact_search as exact_search
from qstar_jax.decoding.search.mcts import mcts as mcts
from qstar_jax.decoding.search.mcts_options import MctsOptions as MctsOptions
