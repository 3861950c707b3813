"""Signals while responses are generated."""

import io
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from rich.console import Console

from qstar_jax.decoding import run
from qstar_jax.interruption import Stopped


class File(nullcontext):
    """Stands for generations.jsonl."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.prompts = folder, {0: "w1"}


@pytest.mark.parametrize("batches", [1, 2])
def test_a_signal_during_the_last_batch_stops_nothing(batches, tmp_path, monkeypatch):
    def generate_missing(*_):
        for row in range(1, 1 + batches):
            yield [(row, [])]
        raise Stopped("stopped", 75)

    monkeypatch.setattr(run, "generate_missing", generate_missing)
    dataset = SimpleNamespace(examples=[SimpleNamespace(row=row) for row in range(3)])
    with nullcontext() if batches == 2 else pytest.raises(Stopped):
        run._generate(None, dataset, {1: "w2", 2: "w3"}, File(tmp_path), 1, Console(file=io.StringIO()))
