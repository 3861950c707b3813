"""DPO steps of the torch libraries that dpo_vs_trl.py compares with, as worker programs.

    python tests/benchmarks/dpo_peers.py trl|torch --model FOLDER --pairs FILE.npz [--batch 4] [--reference live|cached]

`trl` is TRL's DPOTrainer in the training loop of transformers; `torch` is the step that one would write by hand. Both
take the pairs in order, whole batches, over and over, with the same loss, clipping and optimizer.

FILE.npz has integer arrays: prompts and answers (token ids, one after the other), prompt_lengths [N], answer_lengths
[N, 2] (chosen, rejected) and pad_id. The answers of a pair follow each other, and EOS is part of them.

A worker takes its first batch as a warm-up and prints a line of JSON with "ready" and the loss of that step. Then it
answers the lines of standard input: `step N` with "seconds", "pairs" and "losses" of the next N steps, `stop` (or the
end of the input) with "peak_memory_bytes" and "baseline_bytes", the memory of the process after its imports. All else
that libraries print goes to standard error. Linux hands a parent's peak memory on to its children, so the parent has to
be small.
"""

import argparse
import contextlib
import itertools
import json
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from typing import TextIO

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

BETA, MAX_GRAD_NORM = 0.1, 1.0
Pair = dict[str, list[int]]  # prompt_ids, chosen_ids, rejected_ids: the columns of TRL's collator


class Worker:
    """Tells the parent what became of its steps, and runs as many as it asks for."""

    def __init__(self, options: argparse.Namespace, answers: TextIO):
        self.options, self.answers = options, answers
        self.baseline_bytes = psutil.Process().memory_info().rss
        self.ready = False
        self._begin(steps=1)

    def _begin(self, steps: int) -> None:
        self.steps, self.losses, self.start = steps, [], time.perf_counter()

    def _answer(self, **fields) -> None:
        print(json.dumps(fields), file=self.answers, flush=True)

    def wants_more(self, loss: float) -> bool:
        """Takes the loss of a step that is complete; waits for the next request if it was the last one of its own."""
        self.losses.append(loss)
        if len(self.losses) < self.steps:
            return True
        seconds = time.perf_counter() - self.start
        if self.ready:
            self._answer(seconds=seconds, pairs=self.steps * self.options.batch, losses=self.losses)
        else:
            versions = {name: version(name) for name in ("torch", "transformers", "accelerate", "trl")}
            options = vars(self.options) | {"threads": torch.get_num_threads()}  # as the libraries left them
            self._answer(ready=True, losses=self.losses, versions=versions, **options)
            self.ready = True
        match sys.stdin.readline().split():
            case ["step", steps] if steps.isdecimal() and int(steps) > 0:
                self._begin(int(steps))
                return True
            case ["stop"] | []:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                self._answer(peak_memory_bytes=peak, baseline_bytes=self.baseline_bytes)
                return False
            case request:
                sys.exit(f"unknown request {' '.join(request)!r}; expected 'step N' or 'stop'")


def load_pairs(path: str, batch: int) -> tuple[list[Pair], int]:
    """Reads the pairs and the pad id; only whole batches, so that every step has the same number of pairs."""
    data = np.load(path)
    prompts = np.split(data["prompts"], np.cumsum(data["prompt_lengths"])[:-1])
    answers = np.split(data["answers"], np.cumsum(data["answer_lengths"])[:-1])
    columns = zip(prompts, answers[::2], answers[1::2], strict=True)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [{name: ids.tolist() for name, ids in zip(names, pair, strict=True)} for pair in columns]
    if len(pairs) < batch:
        sys.exit(f"{path} has {len(pairs)} pairs; expected at least a batch of {batch}")
    return pairs[: len(pairs) // batch * batch], int(data["pad_id"])


def load_model(options: argparse.Namespace) -> PreTrainedModel:
    """Loads float32 weights, whatever type the steps compute in, without dropout (evaluation mode)."""
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)


def run_trl(options: argparse.Namespace, pairs: list[Pair], pad_id: int, answers: TextIO) -> None:
    """Runs `DPOTrainer.train()`; a callback at the end of each step talks to the parent."""
    # imported here, for they would count in the memory of the other worker
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    worker = Worker(options, answers)

    class PretokenizedTrainer(DPOTrainer):
        step_loss = 0.0

        def _prepare_dataset(self, dataset, *_):
            return dataset  # TRL would tokenise text here; its columns after that are the ones that the pairs have

        def _send_telemetry(self):
            pass  # a benchmark calls nobody

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)  # already divided by the micro-batches
            self.step_loss += loss
            return loss

    class Requests(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            loss, trainer.step_loss = trainer.step_loss.item(), 0.0
            control.should_training_stop = not worker.wants_more(loss)

    # of a tokenizer the trainer needs no more than the pad id
    vocabulary = Tokenizer(WordLevel({"<pad>": pad_id}, unk_token="<pad>"))
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            beta=BETA,
            max_length=None,
            precompute_ref_log_probs=options.reference == "cached",
            per_device_train_batch_size=options.batch // options.accumulate,
            gradient_accumulation_steps=options.accumulate,
            train_sampling_strategy="sequential",
            max_steps=10**9,  # until the parent says stop
            optim=options.optim,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            gradient_checkpointing=False,
            bf16=options.dtype == "bfloat16",
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = PretokenizedTrainer(
            model=load_model(options),  # the reference, if live, is loaded by TRL from the same folder
            args=config,
            train_dataset=Dataset.from_list(pairs),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>"),
            callbacks=[Requests()],
        )
        trainer.train()


def collate(pairs: list[Pair], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Makes token ids, attention mask and answer mask [2 B, T], padded on the right; the chosen answers come first."""
    rows = [(pair["prompt_ids"], pair[answer]) for answer in ("chosen_ids", "rejected_ids") for pair in pairs]
    shape = len(rows), max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, attended, answered = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long), torch.zeros(shape).bool()
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        attended[row, :end] = 1
        answered[row, len(prompt) : end] = True
    return ids, attended, answered


def answer_logprobs(
    model: PreTrainedModel, ids: torch.Tensor, attended: torch.Tensor, answered: torch.Tensor
) -> torch.Tensor:
    """Sums the log-probabilities of each row's answer; logits exist at the positions that predict its tokens only."""
    hidden = model.model(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state[:, :-1]
    predicting, targets = answered[:, 1:], ids[:, 1:]
    logits = model.lm_head(hidden[predicting]).float()
    logprobs = logits.log_softmax(-1).gather(-1, targets[predicting][:, None])[:, 0]
    return logprobs.new_zeros(len(ids)).index_add(0, predicting.nonzero()[:, 0], logprobs)


def run_torch(options: argparse.Namespace, pairs: list[Pair], pad_id: int, answers: TextIO) -> None:
    """Runs plain DPO steps."""
    worker = Worker(options, answers)
    model = load_model(options)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, weight_decay=0, fused=options.optim == "adamw_torch_fused"
    )
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16")

    def reference_logprobs(reference: PreTrainedModel, batch: list[Pair]) -> torch.Tensor:
        with torch.no_grad(), autocast:
            return answer_logprobs(reference, *collate(batch, pad_id))

    size = options.batch // options.accumulate
    batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    if options.reference == "live":
        reference, cached = load_model(options), None
    else:
        cached = [reference_logprobs(model, batch) for batch in batches]

    def add_gradient(index: int) -> float:
        # the reference first, while there are no activations of the policy
        baseline = cached[index] if cached else reference_logprobs(reference, batches[index])
        with autocast:
            logprobs = answer_logprobs(model, *collate(batches[index], pad_id))
        chosen, rejected = (logprobs - baseline).chunk(2)
        loss = -F.logsigmoid(BETA * (chosen - rejected)).mean() / options.accumulate
        loss.backward()
        return loss.item()

    def step() -> float:
        loss = sum(add_gradient(next(indices)) for _ in range(options.accumulate))
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    indices = itertools.cycle(range(len(batches)))
    while worker.wants_more(step()):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=["trl", "torch"])
    parser.add_argument("--model", required=True, help="Hugging Face folder of a Llama-family model")
    parser.add_argument("--pairs", required=True, help="FILE.npz")
    parser.add_argument("--batch", type=int, default=4, help="pairs per step")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reference", choices=["live", "cached"], default="live")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument(
        "--optim",
        choices=["adamw_torch", "adamw_torch_fused"],
        default="adamw_torch",
        help="transformers takes the fused one unless told",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = run_trl if options.library == "trl" else run_torch
    with contextlib.redirect_stdout(sys.stderr):
        run(options, *load_pairs(options.pairs, options.batch), sys.__stdout__)


if __name__ == "__main__":
    main()
