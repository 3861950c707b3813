"""Scores every response of a file: scores.jsonl, from which pages are drawn and credit is measured."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from qstar_jax.config import ScoreConfig
from qstar_jax.console import say
from qstar_jax.data.dropped import Dropped
from qstar_jax.data.identity import examples_identity
from qstar_jax.data.loading import load_examples
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.errors import InputError
from qstar_jax.evaluation.scored import ScoredResponse, unscored_line
from qstar_jax.evaluation.token_rewards import score_dataset
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.identity import write_identity
from qstar_jax.store.open import load_model
from qstar_jax.store.references import find_beta, open_reference

SCORES = "scores.jsonl"
KINDS = {"pairs": "preferences", "single": "completions"}  # option `answers` -> kind of records


@dataclass(frozen=True)
class ScoredFile:
    """The scored responses of a file, in its order, with the policy's tokenizer and the name of its reference."""

    config: ScoreConfig
    responses: list[ScoredResponse]
    tokenizer: Any
    reference: str
    dropped: Sequence[Dropped] = ()

    @property
    def out(self) -> Path:
        """The folder that holds scores.jsonl."""
        return Path(self.config.out)

    @property
    def path(self) -> Path:
        """The file of scores."""
        return self.out / SCORES

    def write(self):
        """Writes scores.jsonl: a line for each response, and for each row that has none."""
        lines = [response.to_json() for response in self.responses]
        lines += [unscored_line(row.row, row.fault or row.reason) for row in self.dropped]
        with self.path.open("w", encoding="utf-8") as file:
            for line in sorted(lines, key=lambda line: line["row"]):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def score_file(config: ScoreConfig, console: Console) -> ScoredFile:
    """Scores every response of a file and writes scores.jsonl.

    Raises:
        InputError: If the file, the model or its reference cannot be used.
    """
    if config.data.eval is None:
        raise InputError("--data.eval is missing: name the file whose responses are to be scored")
    mesh, data = make_mesh(config.mesh), config.data
    with use_mesh(mesh, config.compute.dtype):
        load = partial(load_model, compute=config.compute, mesh=mesh, mesh_options=config.mesh)
        policy = load(config.model)
        reference = open_reference(policy, config.reference, config.model, load)
        beta = find_beta(policy, config.beta, config.model, "--beta")
        if reference.model != policy.model:
            raise InputError(
                f"reference {reference.source} and model {config.model} have different shapes (config.json)"
            )
        kind = KINDS[config.answers]
        vocab = {"vocabulary": policy.model.config.vocab_size, "eos_ids": eos_token_ids(policy), "console": console}
        dataset = load_examples(data.eval, data.eval_split, kind, policy.tokenizer, data, data.max_eval_rows, **vocab)
        say(console, dataset.report(policy.model))
        responses = score_dataset(
            policy,
            reference.params,
            dataset,
            beta=beta,
            batch_size=config.batch_size,
            mesh=mesh,
            alternatives=config.alternatives,
            first=config.show,
            console=console,
        )
        identity = {"model": policy.identity(), "reference": reference.identity(), "beta": beta}
    name = str(config.reference or reference.source)
    scored = ScoredFile(config, responses, policy.tokenizer, name, dataset.dropped)
    settled = replace(config, data=replace(data, date=dataset.date))
    identity |= {"data": examples_identity(dataset.examples), "options": asdict(settled)}
    scored.out.mkdir(parents=True, exist_ok=True)
    _remove_earlier(scored.out)
    write_identity(scored.path, identity)
    scored.write()
    return scored


def _remove_earlier(out: Path):
    """Removes the files of an earlier run, so that none of them stands beside the new ones."""
    for name in (SCORES, "scores.identity.json", "heatmap.html", "credit.json", "credit.png"):
        (out / name).unlink(missing_ok=True)
