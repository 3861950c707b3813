"""Translates configurations of `trl dpo` (TRL 1.16) into options of `qstar dpo`.

Defaults are TRL's where a file leaves an option out, so that the same file describes the same run.
"""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qstar_jax.errors import InputError

Options = dict[str, Any]

# TRL's name -> our option with the same meaning, and TRL's default.
_SAME: dict[str, tuple[str, Any]] = {
    "model_name_or_path": ("model", None),
    "output_dir": ("out", None),
    "dataset_name": ("data.train", None),
    "dataset_config": ("data.name", None),
    "dataset_train_split": ("data.train_split", "train"),
    "dataset_test_split": ("data.eval_split", "test"),
    "learning_rate": ("optimizer.learning_rate", 1e-6),
    "weight_decay": ("optimizer.weight_decay", 0.0),
    "max_grad_norm": ("optimizer.max_grad_norm", 1.0),
    "gradient_accumulation_steps": ("train.accumulate", 1),
    "logging_steps": ("train.log_every", 10),
    "beta": ("loss.beta", 0.1),
    "label_smoothing": ("loss.label_smoothing", 0.0),
    "ld_alpha": ("loss.ld_alpha", None),
    "loss_weights": ("loss.weights", None),
    "f_divergence_type": ("loss.divergence", "reverse_kl"),
    "resume_from_checkpoint": ("resume", None),
}
_OPTIMIZERS = {"adamw": "adamw", "adafactor": "adafactor", "rmsprop": "rmsprop", "lion": "lion"}
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant"}
_METRICS = ("loss", "rewards/margins", "rewards/accuracies")
# Read by the functions below, with TRL's defaults.
_CONVERTED: Options = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "max_length": 1024,
    "optim": "adamw_torch_fused",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "warmup_ratio": 0.0,
    "loss_type": ["sigmoid"],
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
    "bf16": None,
    "fp16": False,
    "dtype": "float32",
    "gradient_checkpointing": True,
    "activation_checkpointing": None,
    "seed": 42,
    "data_seed": None,
    "eval_strategy": "no",
    "eval_steps": None,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "precompute_ref_log_probs": False,
    "sync_ref_model": False,
    "ref_model_sync_steps": 512,
    "ref_model_mixup_alpha": 0.6,
    "use_peft": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": None,
}
# What we cannot do, unless it has this value, which changes nothing.
_MISSING: Options = {
    "model_revision": "main",
    "trust_remote_code": False,
    "model_init_kwargs": None,
    "router_aux_loss_coef": None,
    "truncation_mode": "keep_start",
    "use_weighting": False,
    "disable_dropout": True,
    "dataset_streaming": False,
    "lora_dropout": 0.0,
    "lora_target_parameters": None,
    "lora_modules_to_save": None,
    "lora_task_type": "CAUSAL_LM",
    "use_rslora": False,
    "use_dora": False,
    "load_in_8bit": False,
    "load_in_4bit": False,
    "neftune_noise_alpha": None,
    "label_smoothing_factor": 0.0,
    "lr_scheduler_kwargs": None,
    "optim_args": None,
    "optim_target_modules": None,
    "push_to_hub": False,
    "train_sampling_strategy": "random",
    "dataloader_drop_last": False,
    "eval_delay": 0,
    "eval_on_start": False,
}
# Where and how the same numbers are computed, and what is logged: other options of ours, or none, do that.
_ELSEWHERE = """
    accelerator_config activation_checkpointing_kwargs activation_offloading
    attn_implementation auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16_full_eval
    bnb_4bit_quant_storage bnb_4bit_quant_type dataloader_in_order dataloader_multiprocessing_context
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
    dataset_num_proc ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph
    ddp_timeout debug deepspeed disable_tqdm do_eval do_predict do_train enable_jit_checkpoint
    eval_accumulation_steps eval_do_concat_batches eval_use_gather_object fp16_full_eval fsdp fsdp_config
    full_determinism gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id hub_private_repo
    hub_revision hub_strategy hub_token ignore_bias_buffers ignore_data_skip include_for_metrics
    include_num_input_tokens_seen label_names length_column_name liger_kernel_config local_rank log_level
    log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter logging_strategy pad_to_multiple_of
    pad_token padding_free parallelism_config precompute_ref_batch_size prediction_loss_only project
    remove_unused_columns report_to restore_callback_states_from_checkpoint run_name save_on_each_node
    save_only_model skip_memory_metrics tf32 torch_compile torch_compile_backend torch_compile_mode
    torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id use_bnb_nested_quant
    use_cache use_cpu use_liger_kernel
""".split()
_INSTEAD: Options = {
    "truncation_mode": "a longer response loses its end",
    "load_in_8bit": "parameters are stored as compute.param_dtype says, which takes more memory",
    "load_in_4bit": "parameters are stored as compute.param_dtype says, which takes more memory",
    "use_dora": "adapters are plain LoRA",
    "use_rslora": "the adapter's scale is lora.alpha / lora.rank",
    "lora_dropout": "adapters have none",
    "report_to": "metrics.jsonl, TensorBoard's files and curves.png are written always, and nothing else",
    "fsdp": "mesh.fsdp is the number of devices that share parameters",
    "fsdp_config": "mesh.fsdp is the number of devices that share parameters",
    "deepspeed": "mesh.fsdp is the number of devices that share parameters",
    "attn_implementation": "compute.attention chooses the kernel",
}
KNOWN = frozenset([*_SAME, *_CONVERTED, *_MISSING, *_ELSEWHERE])  # and warmup_ratio, of older versions
# Of versions of TRL before 1.0: without effect on the numbers here.
_OLDER = frozenset(
    "force_use_ref_model generate_during_eval is_encoder_decoder label_pad_token_id model_adapter_name "
    "padding_value ref_adapter_name use_logits_to_keep use_num_logits_to_keep".split()
)
# What would change the run, and how to say it here.
_REFUSED = {
    "datasets": "name one dataset, with dataset_name",
    "env": "set the variables before the command",
    "max_completion_length": "max_length limits prompt and response together",
    "max_target_length": "max_length limits prompt and response together",
    "ref_model_name_or_path": "the reference is the model with which the run begins (model_name_or_path)",
    "reference_free": "choose a loss without a reference, such as simpo (loss_type)",
    "rpo_alpha": "loss_type [sigmoid, sft] with loss_weights [1, ALPHA]",
}


def translate(given: Options) -> tuple[Options, list[str]]:
    """Translates the contents of a configuration of `trl dpo`.

    Args:
        given: TRL's options by name.

    Returns:
        Our options, nested as in a configuration of ours, and a sentence about each option that was not taken over as
        it is.

    Raises:
        InputError: Options are unknown, or cannot be left out without changing the run.
    """
    _check_names(given)
    trl = {name: default for name, (_, default) in _SAME.items()} | _CONVERTED | given
    options, notes = {}, []
    for name, (ours, default) in _SAME.items():
        # Options of losses that are as by default stay unset: not every loss has them.
        if trl[name] is not None and not (ours.startswith("loss.") and ours != "loss.beta" and trl[name] == default):
            options[ours] = trl[name]
    if isinstance(trl["resume_from_checkpoint"], str):
        del options["resume"]
        notes.append(f"resume_from_checkpoint {trl['resume_from_checkpoint']}: --resume continues the run in --out")
    for convert in (_batches, _optimizer, _loss, _numbers, _intervals, _reference, _adapter):
        options |= convert(trl, notes.append)
    for name, harmless in _MISSING.items():
        if given.get(name, harmless) != harmless:
            notes.append(f"{name} {given[name]}: not supported" + (f"; {_INSTEAD[name]}" if name in _INSTEAD else ""))
    for name in sorted(given.keys() & {*_ELSEWHERE, *_OLDER}):
        notes.append(f"{name}: {_INSTEAD.get(name, 'not read, as it does not change the numbers')}")
    return _nested(options), notes


def _check_names(given: Options):
    """Refuses names that are not TRL's, all at once."""
    known = KNOWN | _OLDER | {"max_prompt_length"}
    faults = [f"{name} is not supported: {_REFUSED[name]}" for name in sorted(given.keys() & _REFUSED.keys())]
    for name in sorted(given.keys() - known - _REFUSED.keys(), key=str):
        nearest = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; the nearest is {nearest[0]}" if nearest else ""
        faults.append(f"`trl dpo` has no option {name!r} (TRL 1.16){hint}")
    if faults:
        raise InputError("--from_trl: " + "\n--from_trl: ".join(faults))


Note = Callable[[str], None]


def _batches(trl: Options, note: Note) -> Options:
    size = trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"]
    note(
        f"train.batch_size is {size}, that of one process (per_device_train_batch_size x gradient_accumulation_steps); "
        "multiply it by the number of processes of the TRL run"
    )
    length = trl["max_length"] or 2**20
    options = {
        "train.batch_size": size,
        "train.eval_batch_size": trl["per_device_eval_batch_size"],
        "data.max_length": length,
        "data.max_prompt_length": trl.get("max_prompt_length") or length - 1,
        "train.seed": trl["seed"] if trl["data_seed"] is None else trl["data_seed"],
    }
    steps = trl["max_steps"]
    return options | ({"train.steps": steps} if steps > 0 else {"train.epochs": float(trl["num_train_epochs"])})


def _optimizer(trl: Options, note: Note) -> Options:
    family = str(trl["optim"]).split("_")[0]
    if family not in _OPTIMIZERS:
        note(f"optim {trl['optim']}: not supported; adamw instead")
    options: Options = {"optimizer.name": _OPTIMIZERS.get(family, "adamw")}
    if options["optimizer.name"] in ("adamw", "lion"):
        options |= {"optimizer.beta1": trl["adam_beta1"], "optimizer.beta2": trl["adam_beta2"]}
    if options["optimizer.name"] == "adamw":
        options |= {"optimizer.eps": trl["adam_epsilon"]}
    schedule = str(trl["lr_scheduler_type"])
    if schedule not in _SCHEDULES:
        nearest = next((name for name in _SCHEDULES if schedule.startswith(name)), "linear")
        if schedule != "constant_with_warmup":
            note(f"lr_scheduler_type {schedule}: not supported; {nearest} instead")
        schedule = nearest
    return options | {
        "optimizer.schedule": schedule,
        "optimizer.warmup_steps": trl["warmup_steps"] or trl["warmup_ratio"],
    }


def _loss(trl: Options, note: Note) -> Options:
    names = trl["loss_type"] if isinstance(trl["loss_type"], list) else [trl["loss_type"]]
    options: Options = {"loss.name": names if len(names) > 1 else names[0]}
    if trl["f_divergence_type"] == "alpha_divergence":
        options["loss.divergence_alpha"] = trl["f_alpha_divergence_coef"]
    if "discopop" in names:
        options["loss.tau"] = trl["discopop_tau"]
    return options


def _numbers(trl: Options, note: Note) -> Options:
    if trl["fp16"]:
        note("fp16: bfloat16 instead")
    half = trl["bf16"] is not False
    checkpointing = trl["activation_checkpointing"]  # the newer name
    checkpointing = trl["gradient_checkpointing"] if checkpointing is None else checkpointing
    params = "bfloat16" if trl["dtype"] in ("bfloat16", "float16") else "float32"
    if trl["dtype"] not in ("float32", "bfloat16"):
        note(f"dtype {trl['dtype']}: parameters are stored as {params}")
    return {
        "compute.dtype": "bfloat16" if half else "float32",
        "compute.param_dtype": params,
        "compute.remat": "full" if checkpointing else "none",
    }


def _intervals(trl: Options, note: Note) -> Options:
    options: Options = {"train.save_every": _interval("save", trl, trl["save_steps"], note)}
    if trl["save_strategy"] == "best":
        note("save_strategy best: saved at the end; set train.keep_best")
    if trl["save_total_limit"] is None:
        note("save_total_limit: TRL keeps all checkpoints, and train.keep_checkpoints the newest 2")
    else:
        options["train.keep_checkpoints"] = trl["save_total_limit"]
    if trl["eval_strategy"] != "no":
        options["train.eval_every"] = _interval("eval", trl, trl["eval_steps"] or trl["logging_steps"], note)
        if trl["dataset_name"] and Path(trl["dataset_name"]).expanduser().is_file():
            note(f"{trl['dataset_name']} is a file without splits: set data.eval to one of held-out rows")
        else:
            options["data.eval"] = trl["dataset_name"]
    if trl["load_best_model_at_end"]:
        metric = (trl["metric_for_best_model"] or "loss").removeprefix("eval_")
        if metric in _METRICS:
            options["train.keep_best"] = metric
        else:
            note(f"metric_for_best_model {metric}: not supported; train.keep_best takes {', '.join(_METRICS)}")
    return options


def _interval(what: str, trl: Options, steps: float, note: Note) -> float:
    """Steps between evaluations or checkpoints; below 1: their share of all steps."""
    strategy = trl[f"{what}_strategy"]
    if strategy == "epoch" and trl["max_steps"] > 0:
        note(f"{what}_strategy epoch with max_steps: at the end only; set train.{what}_every, in steps")
    elif strategy == "epoch" and trl["num_train_epochs"] > 1:
        return 1 / trl["num_train_epochs"]
    return steps if strategy == "steps" else 0


def _reference(trl: Options, note: Note) -> Options:
    options: Options = {}
    if trl["precompute_ref_log_probs"]:
        options["reference.mode"] = "cached"
    if trl["sync_ref_model"]:
        options["reference.sync_every"] = trl["ref_model_sync_steps"]
        options["reference.sync_mix"] = trl["ref_model_mixup_alpha"]
    return options


def _adapter(trl: Options, note: Note) -> Options:
    if not trl["use_peft"]:
        return {}
    if "lora_dropout" not in trl:
        note("lora_dropout: TRL's default is 0.05, and adapters here have none")
    targets = trl["lora_target_modules"]
    options: Options = {"lora.rank": trl["lora_r"], "lora.alpha": float(trl["lora_alpha"])}
    if targets not in (None, "all-linear", ["all-linear"]):
        options["lora.targets"] = [targets] if isinstance(targets, str) else targets
    elif targets is None:
        note("lora_target_modules: PEFT's default depends on the family; here all linear layers have an adapter")
    return options


def _nested(options: Options) -> Options:
    """`{"data.train": x}` as `{"data": {"train": x}}`."""
    nested: Options = {}
    for name, value in options.items():
        *blocks, last = name.split(".")
        block = nested
        for part in blocks:
            block = block.setdefault(part, {})
        block[last] = value
    return nested
