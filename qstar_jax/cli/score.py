"""`qstar score`."""

import json
from functools import partial
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import track

from qstar_jax import mdp
from qstar_jax.config import ScoreConfig
from qstar_jax.data.batches import Batch
from qstar_jax.data.loading import Dataset, load_examples
from qstar_jax.errors import InputError
from qstar_jax.loading import LoadedModel, load_model
from qstar_jax.report.page import heatmap_page
from qstar_jax.report.scored import ScoredResponse, token_pieces
from qstar_jax.report.terminal import print_heatmaps
from qstar_jax.scoring import score_tokens
from qstar_jax.sharding import make_mesh
from qstar_jax.training.feeding import Feeder

ROLES = {"pairs": ("chosen", "rejected"), "single": ("answer",)}
KINDS = {"pairs": "preferences", "single": "completions"}


def run(config: ScoreConfig, console: Console | None = None) -> list[ScoredResponse]:
    """Scores every answer of a file; writes scores.jsonl and heatmap.html, and shows the first rows.

    Args:
        config: The options.
        console: Where to show them; the standard output by default.

    Returns:
        One record an answer, in file order.
    """
    console = console or Console()
    if config.data.eval is None:
        raise InputError("--data.eval is missing: name the file whose answers shall be scored")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        policy = load_model(config.model, config.compute, mesh, config.mesh)
        source, beta = _reference_and_beta(config, policy)
        reference = load_model(source, config.compute, mesh, config.mesh)
        if reference.model != policy.model:
            raise InputError(f"reference {source} and model {config.model} have different shapes (config.json)")
        dataset = load_examples(
            config.data.eval,
            config.data.eval_split,
            KINDS[config.answers],
            policy.tokenizer,
            config.data,
            config.data.max_eval_rows,
        )
        console.print(dataset.summary, markup=False, highlight=False, soft_wrap=True)
        feeder = Feeder(dataset, config.batch_size, mesh, policy.tokenizer.pad_token_id or 0, "batch_size")
        score = jax.jit(partial(score_tokens, policy.model), out_shardings=NamedSharding(mesh, PartitionSpec()))
        scored: list[ScoredResponse] = []
        batches = -(-len(dataset.examples) // config.batch_size)
        shown = track(feeder.in_order(), "scoring", total=batches, console=console, disable=not console.is_terminal)
        for batch in shown:
            scores = jax.device_get(score(policy.params, reference.params, batch))
            scored += _records(scores, batch, dataset, len(scored), ROLES[config.answers], policy, beta)
    _write(config, scored, console)
    return scored


def _reference_and_beta(config: ScoreConfig, policy: LoadedModel) -> tuple[str | Path, float]:
    source = config.reference or policy.reference
    if source is None:
        raise InputError(
            f"{config.model} carries no reference (only a DPO run does); name one with --reference: "
            "the model from which its training began"
        )
    options = policy.description.options if policy.description else {}
    beta = config.beta if config.beta is not None else options.get("loss", {}).get("beta")
    if beta is None:
        raise InputError(f"{config.model} does not record a beta (only a DPO run does); give --beta, for instance 0.1")
    return source, beta


def _records(
    scores: mdp.TokenScores,
    batch: Batch,
    dataset: Dataset,
    done: int,
    roles: tuple[str, ...],
    policy: LoadedModel,
    beta: float,
) -> list[ScoredResponse]:
    mask = jax.device_get(batch.response_mask)
    rewards = mdp.implicit_rewards(scores.logp, scores.ref_logp, mask, beta=beta)
    fields = {
        "logp": scores.logp,
        "ref_logp": scores.ref_logp,
        "reward": jax.device_get(rewards),
        "q": mdp.q_values(scores.logp, scores.logz, beta=beta),
        "v": mdp.state_values(scores.logz, beta=beta),
    }
    first = done // len(roles)
    records = []
    for b, example in enumerate(dataset.examples[first : first + len(batch.weights)]):
        prompt = policy.tokenizer.decode(example.prompt, skip_special_tokens=False)
        for r, (role, response) in enumerate(zip(roles, example.responses, strict=True)):
            length = len(response.ids)
            records.append(
                ScoredResponse(
                    row=example.row,
                    role=role,
                    prompt=prompt,
                    pieces=token_pieces(response.ids, policy.tokenizer),
                    token_ids=tuple(response.ids.tolist()),
                    truncated=response.truncated,
                    beta=beta,
                    **{name: tuple(values[b, r, :length].tolist()) for name, values in fields.items()},
                )
            )
    return records


def _write(config: ScoreConfig, scored: list[ScoredResponse], console: Console):
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "scores.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record.to_json(), ensure_ascii=False) + "\n" for record in scored)
    shown = scored[: config.show * len(ROLES[config.answers])]
    if shown:
        print_heatmaps(shown, console)
        page = heatmap_page(shown, f"Token rewards: {Path(config.model).name}")
        (out / "heatmap.html").write_text(page, encoding="utf-8")
    console.print(
        f"{len(scored)} answers scored: {out / 'scores.jsonl'}", markup=False, highlight=False, soft_wrap=True
    )
