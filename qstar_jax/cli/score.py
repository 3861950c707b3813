"""`qstar score`."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import track

from qstar_jax.config import ScoreConfig
from qstar_jax.data.loading import Dataset, load_examples, read_records
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.credit import MarkedAnswer, credit_report, mark_answers
from qstar_jax.evaluation.scored import ScoredResponse, unscored_line
from qstar_jax.evaluation.token_rewards import score_dataset
from qstar_jax.report.figures import write_figures
from qstar_jax.report.insights_terminal import print_credit
from qstar_jax.report.page import heatmap_page
from qstar_jax.report.terminal import print_heatmaps
from qstar_jax.sharding import make_mesh
from qstar_jax.store.identity import examples_identity, file_digest, write_identity
from qstar_jax.store.open import LoadedModel, load_model
from qstar_jax.store.references import find_beta, open_reference
from qstar_jax.tasks.tiny_tldr import BUILTIN, read_post
from qstar_jax.tasks.tiny_tldr.oracle import Oracle

SCORES = "scores.jsonl"
KINDS = {"pairs": "preferences", "single": "completions"}


def run(config: ScoreConfig):
    """Scores every answer of a file; writes scores.jsonl and heatmap.html, and shows the first rows."""
    console = Console()
    if config.data.eval is None:
        raise InputError("--data.eval is missing: name the file whose answers shall be scored")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        load = partial(load_model, compute=config.compute, mesh=mesh, mesh_options=config.mesh)
        policy = load(config.model)
        reference = open_reference(policy, config.reference, config.model, load)
        beta = find_beta(policy, config.beta, config.model, "--beta")
        if reference.model != policy.model:
            raise InputError(
                f"reference {reference.source} and model {config.model} have different shapes (config.json)"
            )
        data = config.data
        kind = KINDS[config.answers]
        known = {"vocabulary": policy.model.config.vocab_size, "eos_ids": eos_token_ids(policy)}
        dataset = load_examples(data.eval, data.eval_split, kind, policy.tokenizer, data, data.max_eval_rows, **known)
        console.print(dataset.report(policy.model), markup=False, highlight=False, soft_wrap=True)
        scored = score_dataset(
            policy,
            reference.params,
            dataset,
            beta=beta,
            batch_size=config.batch_size,
            mesh=mesh,
            alternatives=config.alternatives,
            first=config.show,
            track=lambda batches: track(
                batches,
                "scoring",
                total=-(-len(dataset.examples) // config.batch_size),
                console=console,
                disable=not console.is_terminal,
            ),
        )
        identity = {"model": policy.identity(), "reference": reference.identity(), "beta": beta}
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    _remove_earlier(out)
    settled = replace(config, data=replace(data, date=dataset.date))
    identity |= {"data": examples_identity(dataset.examples), "options": asdict(settled)}
    write_identity(out / SCORES, identity)
    _write(config, scored, dataset, console)
    if config.wrong:
        record = credit(config, scored, policy, str(config.reference or reference.source))
        print_credit(record, console)
        files = _write_credit(out, record)
        console.print(f"credit: {files}", markup=False, highlight=False, soft_wrap=True)


def credit(config: ScoreConfig, scored: list[ScoredResponse], policy: LoadedModel, reference: str) -> dict:
    """Measures how well low rewards find the tokens that the file marks as wrong.

    Args:
        config: The run of `qstar score`.
        scored: Its answers.
        policy: The policy.
        reference: What its reference is called.

    Returns:
        What credit.json holds.

    Raises:
        InputError: If the marks do not fit the answers.
    """
    data = config.data
    rows, records, _ = read_records(data.eval, data.eval_split, KINDS[config.answers], data, data.max_eval_rows)
    marked = mark_answers(scored, rows, records, wrong=config.wrong, kind=config.kind, source=data.eval)
    if data.eval.startswith(BUILTIN):
        marked = _with_true_advantages(marked, rows, policy)
    return credit_report(marked, model=config.model, reference=reference)


def _with_true_advantages(marked: list[MarkedAnswer], rows: list[dict], policy: LoadedModel) -> list[MarkedAnswer]:
    """What a perfect policy would give to each token, as the ceiling of what can be reached."""
    tokenizer, beta = policy.tokenizer, marked[0].scored.beta
    oracle = Oracle(lambda text: tokenizer(text).input_ids, tokenizer.eos_token_id, beta)
    return [
        replace(m, advantages=oracle.advantages(read_post(rows[m.scored.row]["prompt"]), m.scored.token_ids))
        for m in marked
    ]


def _remove_earlier(out: Path):
    """Removes what an earlier run has left here, so that nothing of it stands beside what comes."""
    for name in (SCORES, "scores.identity.json", "heatmap.html", "credit.json", "credit.png"):
        (out / name).unlink(missing_ok=True)


def _write_credit(out: Path, record: dict) -> str:
    record = record | {"scores": file_digest(out / SCORES)}
    (out / "credit.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return ", ".join(map(str, [out / "credit.json", *write_figures(out, credit=record)]))


def _write(config: ScoreConfig, scored: list[ScoredResponse], dataset: Dataset, console: Console):
    out = Path(config.out)
    lines = [record.to_json() for record in scored]
    lines += [unscored_line(dropped.row, dropped.fault or dropped.reason) for dropped in dataset.dropped]
    with (out / SCORES).open("w", encoding="utf-8") as file:
        for line in sorted(lines, key=lambda line: line["row"]):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    written = [out / SCORES]
    shown_rows = list(dict.fromkeys(record.row for record in scored))[: config.show]
    shown = [record for record in scored if record.row in shown_rows]
    if shown:
        print_heatmaps(shown, console)
        written.append(out / "heatmap.html")
        title = f"Token rewards: {Path(config.model).name}"
        written[-1].write_text(heatmap_page(shown, title), encoding="utf-8")
    files = ", ".join(str(path) for path in written)
    console.print(f"{len(scored)} answers scored: {files}", markup=False, highlight=False, soft_wrap=True)
