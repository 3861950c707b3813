"""DPO steps of the torch libraries that dpo_vs_trl.py compares with, as worker programs.

    python tests/benchmarks/dpo_peers.py trl|torch --model FOLDER --pairs FILE.npz [--batch 4] [--reference live|cached]

`trl` is TRL's DPOTrainer in the training loop of transformers; `torch` is the step that one would write by hand. Both
take the pairs in order, whole batches, over and over, with the same loss, clipping and optimizer, on the GPU if there
is one.

FILE.npz has integer arrays: prompts and answers (token ids, one after the other), prompt_lengths [N], answer_lengths
[N, 2] (chosen, rejected) and pad_id. The answers of a pair follow each other, and EOS is part of them.

A worker answers the requests that `worker.Turns` lists. Linux hands a parent's peak memory on to its children, so the
parent has to be small.
"""

import argparse
import gc
import itertools
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import is_flash_attn_2_available
from worker import Turns, answering, process_peak_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BETA, MAX_GRAD_NORM = 0.1, 1.0
Pair = dict[str, list[int]]  # prompt_ids, chosen_ids, rejected_ids: the columns of TRL's collator


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
    """Loads float32 weights, or draws them if there are none, always the same; without dropout (evaluation mode)."""
    source = Path(options.model)
    flash = DEVICE.type == "cuda" and options.dtype == "bfloat16" and is_flash_attn_2_available()
    kind = {"dtype": torch.float32, "attn_implementation": "flash_attention_2" if flash else "sdpa"}
    if source.is_dir() and any(source.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(source, **kind).to(DEVICE)
    torch.manual_seed(0)
    with DEVICE:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), **kind).eval()


def free_memory() -> None:
    """Gives back what the last model has left; the peak starts anew."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_turns(options: argparse.Namespace, answers: TextIO) -> Turns:
    """Says that the worker is ready, and what it runs with."""
    peak = torch.cuda.max_memory_allocated if DEVICE.type == "cuda" else process_peak_bytes
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    libraries = ("torch", "transformers", *(("accelerate", "trl") if options.library == "trl" else ()))
    versions = {name: version(name) for name in libraries}
    threads = torch.get_num_threads()  # as the libraries left them
    return Turns(answers, peak, versions=versions, device=device, **vars(options) | {"threads": threads})


def run_trl(options: argparse.Namespace, answers: TextIO) -> None:
    """Runs `DPOTrainer.train()`, which a callback at the end of each step holds until more steps are wanted."""
    # imported here, for they would count in the memory of the other worker
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

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
            loss, trainer.step_loss = trainer.step_loss.item(), 0.0  # waits for the device
            control.should_training_stop = not turns.wants_more(loss, options.batch)

    turns = make_turns(options, answers)
    for index in turns.begun():
        trainer = None
        free_memory()
        pairs, pad_id = load_pairs(options.pairs[index], options.batch)
        with tempfile.TemporaryDirectory() as folder:
            trainer = PretokenizedTrainer(
                model=load_model(options),
                ref_model=load_model(options) if options.reference == "live" else None,
                args=DPOConfig(output_dir=folder, **trl_options(options, index)),
                train_dataset=Dataset.from_list(pairs),
                processing_class=padding_tokenizer(pad_id),
                callbacks=[Requests()],
            )
            trainer.train()


def trl_options(options: argparse.Namespace, index: int) -> dict[str, object]:
    """The options of DPOConfig.

    TRL 1.16 is at its fastest with them: its fused head (Triton kernels on a GPU) is always on, `padding_free` has no
    effect, kernels of the Hub need a network, and the activations of the benchmarks' batches fit without checkpointing.
    """
    accumulate = micro_batches(options, index)
    return {
        "beta": BETA,
        "max_length": None,
        "precompute_ref_log_probs": options.reference == "cached",
        "per_device_train_batch_size": options.batch // accumulate,
        "gradient_accumulation_steps": accumulate,
        "train_sampling_strategy": "sequential",
        "max_steps": 10**9,  # until the parent says stop
        "optim": options.optim,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_GRAD_NORM,
        "gradient_checkpointing": False,
        "bf16": options.dtype == "bfloat16",
        "use_cpu": DEVICE.type == "cpu",
        "dataloader_pin_memory": DEVICE.type == "cuda",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def micro_batches(options: argparse.Namespace, index: int) -> int:
    """Micro-batches per step on a file."""
    return options.accumulate[index if len(options.accumulate) > 1 else 0]


def padding_tokenizer(pad_id: int) -> PreTrainedTokenizerFast:
    """Makes a tokenizer of which a trainer needs no more than the pad id."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = Tokenizer(WordLevel({"<pad>": pad_id}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>")


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
    return ids.to(DEVICE), attended.to(DEVICE), answered.to(DEVICE)


def answer_logprobs(
    model: PreTrainedModel, ids: torch.Tensor, attended: torch.Tensor, answered: torch.Tensor
) -> torch.Tensor:
    """Sums the log-probabilities of each row's answer; logits exist at the positions that predict its tokens only."""
    hidden = model.model(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state[:, :-1]
    predicting, targets = answered[:, 1:], ids[:, 1:]
    logits = model.lm_head(hidden[predicting]).float()
    logprobs = logits.log_softmax(-1).gather(-1, targets[predicting][:, None])[:, 0]
    return logprobs.new_zeros(len(ids)).index_add(0, predicting.nonzero()[:, 0], logprobs)


def run_torch(options: argparse.Namespace, answers: TextIO) -> None:
    """Runs plain DPO steps."""
    turns = make_turns(options, answers)
    for index in turns.begun():
        free_memory()
        train_plainly(options, index, turns)


def train_plainly(options: argparse.Namespace, index: int, turns: Turns) -> None:
    """Trains on a file as long as more steps are wanted."""
    model = load_model(options)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, weight_decay=0, fused=options.optim == "adamw_torch_fused"
    )
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=options.dtype == "bfloat16")
    pairs, pad_id = load_pairs(options.pairs[index], options.batch)
    accumulate = micro_batches(options, index)
    size = options.batch // accumulate
    batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]

    def reference_logprobs(reference: PreTrainedModel, batch: list[Pair]) -> torch.Tensor:
        with torch.no_grad(), autocast:
            return answer_logprobs(reference, *collate(batch, pad_id))

    if options.reference == "live":
        reference, cached = load_model(options), None
    else:
        cached = [reference_logprobs(model, batch) for batch in batches]

    def add_gradient(index: int) -> torch.Tensor:
        # the reference first, while there are no activations of the policy
        baseline = cached[index] if cached else reference_logprobs(reference, batches[index])
        with autocast:
            logprobs = answer_logprobs(model, *collate(batches[index], pad_id))
        chosen, rejected = (logprobs - baseline).chunk(2)
        loss = -F.logsigmoid(BETA * (chosen - rejected)).mean() / accumulate
        loss.backward()
        return loss.detach()

    def step() -> float:
        loss = sum(add_gradient(next(indices)) for _ in range(accumulate))
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    indices = itertools.cycle(range(len(batches)))
    while turns.wants_more(step(), options.batch):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=["trl", "torch"])
    parser.add_argument(
        "--model", required=True, help="Hugging Face folder, or a config.json alone, whose weights are then random"
    )
    parser.add_argument("--pairs", required=True, nargs="+", help="FILE.npz")
    parser.add_argument("--batch", type=int, default=4, help="pairs per step")
    parser.add_argument("--accumulate", type=int, default=[1], nargs="+", help="micro-batches per step, of each file")
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
    answers = sys.stdout
    with answering(answers):
        run(options, answers)


if __name__ == "__main__":
    main()
