"""Signals while responses are generated."""

import io
from contextlib import nullcontext

import pytest
from rich.console import Console

from qstar_jax.data.loading import Dataset
from qstar_jax.decoding import run
from qstar_jax.decoding.decoder import Decoder
from qstar_jax.decoding.generations_file import GenerationsFile
from qstar_jax.interruption import Stopped


@pytest.mark.parametrize("batches", [1, 2])
def test_a_signal_during_the_last_batch_stops_nothing(batches, tmp_path, monkeypatch, random_examples):
    def generate_missing(*_):
        for row in range(1, 1 + batches):
            yield [(row, [])]
        raise Stopped("stopped", 75)

    class File(GenerationsFile):
        def __init__(self):
            self.folder, self.prompts = tmp_path, {0: "w1"}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(run, "generate_missing", generate_missing)
    dataset = Dataset(random_examples(3), (), "prompts")
    with nullcontext() if batches == 2 else pytest.raises(Stopped):
        decoder, console = object.__new__(Decoder), Console(file=io.StringIO())
        run._generate(decoder, dataset, {1: "w2", 2: "w3"}, File(), 1, console)
