"""Every option of every verb, as frozen dataclasses: what a YAML file or a dotted flag may set.

Nothing is imported here that takes time, so `qstar --help` stays quick. Lengths are in tokens.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ComputeOptions:
    """Numbers and memory.

    Args:
        param_dtype: Type in which parameters (and optimizer moments) are stored; float32 with `dtype` bfloat16 trains
            float32 masters by bfloat16 products.
        dtype: Type of activations and matrix products; log-softmax, sums over tokens and losses are float32 always.
        remat: What the backward pass recomputes instead of keeping it: `none`; `dots`, all but matrix products;
            `attention`, all but what attention has read; `full`, each layer.
        attention: Of training and scoring. `dense` computes the scores of whole rows at once; `blockwise` those of 128
            queries at a time, and again in the backward pass, for long rows; `flash` is a kernel for TPUs whose scores
            never leave the processor; `auto` is flash on a TPU, else blockwise.
        longrope: Which rotary frequencies a model with longrope (Phi 3) has: those for texts that fit the context
            before its stretch (`short`), or those for longer ones (`long`), for all texts alike; `auto` is short where
            no row is longer than that context, and refuses to guess where one is.
    """

    param_dtype: Dtype = "float32"
    dtype: Dtype = "float32"
    remat: Literal["none", "dots", "attention", "full"] = "none"
    attention: Literal["auto", "dense", "blockwise", "flash"] = "auto"
    longrope: Literal["auto", "short", "long"] = "auto"


@dataclass(frozen=True)
class MeshOptions:
    """How devices are arranged and parameters are cut.

    Args:
        data: Devices along the axis that replicates parameters and splits the batch; -1 takes what is left.
        fsdp: Devices along the axis that splits both parameters and batch.
        tensor: Devices along the axis that splits parameters only (tensor parallelism).
        min_shard_size: Arrays with fewer elements are replicated.
        overrides: Regular expression on a parameter's path -> one axis name (or null) for each of its dimensions.
        multi_process: Join the other processes of this job. Slurm, Open MPI, Kubernetes and TPU pods are recognised;
            elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say who is who.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    min_shard_size: int = 65536
    overrides: dict[str, list[str | None]] = field(default_factory=dict)
    multi_process: bool = False


@dataclass(frozen=True)
class DataOptions:
    """Where examples come from and how they become tokens.

    Args:
        train: JSONL or a JSON array (.jsonl, .json, also .gz), Parquet, or a data-set name on the hub.
        eval: Held-out examples, in any of the same forms; none: no evaluation.
        train_split: Split to take when `train` is a hub name.
        eval_split: Split to take when `eval` is a hub name.
        prompt: Column of the prompt (text or chat messages); may be missing in files of whole dialogues.
        chosen: Column of the preferred answer.
        rejected: Column of the other answer.
        completion: Column of the answer in files for supervised fine-tuning; where it is missing, `chosen` is used.
        tools: Column of the tools that the chat template shows to the model (a list of JSON schemas, or a JSON string
            of one), in files that have it; null leaves it out.
        system: Column of the system message, in files that have it; it goes before the prompt's messages; null leaves
            it out.
        as_chat: Wrap a plain-text prompt as a user's message and apply the tokenizer's chat template.
        chat_template: Name of one of the tokenizer's chat templates, or a file that holds one (Jinja); not set: the
            tokenizer's default, or `tool_use` for dialogues with tools. A run's tokenizer keeps the choice as its
            default.
        chat_template_kwargs: Further variables that the chat template reads, such as {"enable_thinking": false}.
        date: Day (such as 2026-01-31) that chat templates print as today's; not set: the day on which the run or
            folder was begun, which is kept with it.
        repeated_prompt: What to do where most answers of a file begin with their prompt: `remove` takes it off them,
            `keep` leaves it there, to be learnt and scored with the rest.
        bad_rows: What becomes of rows that cannot be used: a missing column, a null, broken JSON, an empty answer,
            messages that the chat template refuses, and the like. `drop` leaves them out and says so, but stops if
            they are more than a tenth of the file; `stop` stops at the first. Pairs of equal answers are always
            left out.
        max_length: Longest prompt and answer together; a longer answer loses its end, and its EOS.
        max_prompt_length: Longest prompt; a longer one loses its beginning.
        layout: How prompts and answers share rows in training: `packed` computes a prompt once for all its answers, and
            puts several prompts into a row; `shared` gives each prompt a row; `plain` repeats the prompt for every
            answer.
        row_length: Slots of a row where examples are packed; 0 takes those of the longest example.
        max_train_rows: Use the first so many rows of `train` only.
        max_eval_rows: Use the first so many rows of `eval` only.
    """

    train: str = ""
    eval: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    tools: str | None = "tools"
    system: str | None = "system"
    as_chat: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    date: str | None = None
    repeated_prompt: Literal["remove", "keep"] = "remove"
    bad_rows: Literal["drop", "stop"] = "drop"
    max_length: int = 1024
    max_prompt_length: int = 512
    layout: Literal["packed", "shared", "plain"] = "packed"
    row_length: int = 0
    max_train_rows: int | None = None
    max_eval_rows: int | None = None


@dataclass(frozen=True)
class LossOptions:
    """The preference loss: a name and the options that this loss has; one that it does not have is an error.

    Each option that is not set takes the loss's own default. `qstar_jax.losses` has formulas, papers and defaults.

    Args:
        name: sigmoid (DPO), sigmoid_norm, robust, hinge, ipo, ipo_sum, exo_pair, discopop, dpop, dpo_shift, nca_pair,
            bco_pair, sppo_hard, apo_zero, apo_down, implicit_prm, aot, aot_unpaired, plackett_luce; without a reference
            sft, simpo, cpo, orpo, cpl; or a list of them.
        weights: Weight of each loss in a list; 1 each where it is not set.
        beta: Temperature, in nats of reward a nat of log-ratio; what it scales is in each loss's formula (sigmoid:
            0.1).
        label_smoothing: Probability that a label is flipped (sigmoid: conservative DPO).
        divergence: reverse_kl, forward_kl, js_divergence or alpha_divergence to the reference.
        divergence_alpha: Order of alpha_divergence.
        ld_alpha: LD-DPO: weight of tokens beyond the shorter answer's length.
        tau: discopop: width of the blend.
        penalty: dpop: price of a nat by which the chosen answer falls below the reference.
        shift: dpo_shift: weight of the rejected answer.
        gamma: simpo: margin of reward.
        nll_weight: cpo: weight of the chosen answer's negative log-likelihood.
        odds_weight: orpo: weight of the odds ratio.
        normalize: sft, cpo, orpo: how the negative log-likelihood is averaged: batch_tokens, answer_tokens or none.
        bias: cpl: weight of the rejected segment.
        discount: cpl: discount a token.
        bc_weight: cpl: weight of behaviour cloning.
        bc_data: cpl: what is cloned: all or chosen.
    """

    name: list[str] | str = "sigmoid"
    weights: list[float] | None = None
    beta: float | None = None
    label_smoothing: float | None = None
    divergence: str | None = None
    divergence_alpha: float | None = None
    ld_alpha: float | None = None
    tau: float | None = None
    penalty: float | None = None
    shift: float | None = None
    gamma: float | None = None
    nll_weight: float | None = None
    odds_weight: float | None = None
    normalize: Literal["batch_tokens", "answer_tokens", "none"] | None = None
    bias: float | None = None
    discount: float | None = None
    bc_weight: float | None = None
    bc_data: Literal["all", "chosen"] | None = None


@dataclass(frozen=True)
class ReferenceOptions:
    """The reference of a preference loss.

    Args:
        mode: `live` holds a second copy of the parameters and runs it at each step; `cached` computes its
            log-probabilities once, keeps them on disk for this and later runs, and holds no copy; `adapter` runs the
            policy without its adapter (`lora.rank`); `none` is for losses without a reference. `auto` is none for
            those, adapter where there is one, else live.
        cache: Folder of the caches; by default under the user's cache folder.
        sync_every: Steps after which a live reference moves towards the policy (TR-DPO, arXiv 2404.09656); 0: never.
        sync_mix: Weight of the policy in the moved reference; 1 replaces it.
    """

    mode: Literal["auto", "live", "cached", "adapter", "none"] = "auto"
    cache: str | None = None
    sync_every: int = 0
    sync_mix: float = 1.0


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters (LoRA): only they are trained, and the base is stored in `compute.param_dtype`, frozen.

    Args:
        rank: Rank of the adapters, which are float32; 0 trains all parameters.
        alpha: The adapter's product is scaled by alpha / rank; not set: 2 * rank.
        targets: Linear layers that have one: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, in any
            family (without gate_proj where the MLP has no gate); or as the files of the model call them (c_attn,
            attn.c_proj, qkv_proj, query_key_value, ...), where a fused layer stands for all its parts. Not set: all.
    """

    rank: int = 0
    alpha: float | None = None
    targets: list[str] | None = None


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer, behind global-norm clipping. Options that are not set take the optimizer's own default.

    Args:
        name: adamw, lion, adafactor, or rmsprop (the paper's code base).
        learning_rate: Peak rate.
        warmup_steps: Steps of linear warm-up.
        schedule: What follows the warm-up.
        weight_decay: Decoupled decay of matrices: of neither norms nor biases.
        beta1: adamw, lion: decay of the first moment (0.9).
        beta2: adamw, lion: decay of the second moment (0.999; lion 0.99).
        eps: adamw, rmsprop: added to the denominator (1e-8).
        decay: rmsprop: decay of the squares (0.99); adafactor: exponent of its decay (0.8).
        max_grad_norm: Gradients are scaled down to this global norm; 0 switches clipping off.
    """

    name: Literal["adamw", "lion", "adafactor", "rmsprop"] = "adamw"
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    weight_decay: float = 0.0
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    decay: float | None = None
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class TrainOptions:
    """The length and rhythm of a run.

    Args:
        steps: Optimizer steps; 0 goes once through the training rows.
        batch_size: Rows of the file (pairs, for DPO) a step, over all devices, hosts and micro-batches.
        accumulate: Micro-batches into which a step's rows are cut, to be computed one after the other; the gradient is
            that of the whole batch.
        eval_batch_size: The same for evaluation; 0 takes `batch_size`.
        seed: Fixes the order of the rows.
        log_every: Steps between lines of metrics.
        eval_every: Steps between evaluations; 0 evaluates at the start and at the end only.
        save_every: Steps between checkpoints; 0 saves at the end only.
        keep_checkpoints: How many of the newest checkpoints are kept.
        reference_samples: Losses with a reference that does not move: answers drawn from the reference before step 0,
            whose rewards are logged at each evaluation and tell an ordinary fall of chosen rewards from a bad one; 0
            for none. A run that goes on keeps those it began with, or takes 0.
    """

    steps: int = 0
    batch_size: int = 32
    accumulate: int = 1
    eval_batch_size: int = 0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    reference_samples: int = 16


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning on answers: the usual step before DPO.

    Args:
        model: Hugging Face folder, hub name, or an earlier run's folder.
        out: Folder of the run: config.yaml, metrics.jsonl, curves.png, checkpoints/, summary.json; with an adapter
            also base/.
        resume: Go on from the newest checkpoint in `out`, with the options and data that the run began with; without
            one, begin at step 0.
    """

    model: str
    out: str
    resume: bool = False
    data: DataOptions = field(default_factory=DataOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)


@dataclass(frozen=True)
class DpoConfig:
    """Training on preference pairs, by DPO unless another loss is named: log-ratios become a token-level reward.

    Args:
        model: Hugging Face folder, hub name, or an earlier run's folder; also the frozen reference, if the loss has
            one.
        out: Folder of the run: config.yaml, metrics.jsonl, curves.png, checkpoints/, summary.json; reference/, or with
            an adapter base/.
        resume: Go on from the newest checkpoint in `out`, with the options and data that the run began with; without
            one, begin at step 0.
    """

    model: str
    out: str
    resume: bool = False
    data: DataOptions = field(default_factory=DataOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    reference: ReferenceOptions = field(default_factory=ReferenceOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)


@dataclass(frozen=True)
class ScoreConfig:
    """The reward that a preference-trained model gives to each token of each answer.

    Args:
        model: Folder of a DPO run (or of one of its checkpoints), a Hugging Face folder, or a hub name.
        out: Folder for scores.jsonl, scores.identity.json and heatmap.html; they replace those of an earlier run there.
        reference: Folder or hub name of the reference; a DPO run carries its own.
        beta: Temperature of the rewards; a DPO run carries its own.
        answers: `pairs` scores chosen and rejected, `single` the one answer of each row (column `completion`).
        batch_size: Rows scored at once.
        show: How many rows to colour in the terminal and on the page.
        alternatives: How many of the policy's likeliest tokens to show beside each token of these rows.
        wrong: Column that marks what is wrong in an answer (in rejected ones, of pairs): a list of [start, end)
            character ranges, or of texts that occur in it once. How well low rewards find these tokens goes to
            credit.json.
        kind: Column that names the kind of a mistake, where there are several.
        data: `data.eval` is the file that is scored.
    """

    model: str
    out: str
    reference: str | None = None
    beta: float | None = None
    answers: Literal["pairs", "single"] = "pairs"
    batch_size: int = 4
    show: int = 3
    alternatives: int = 5
    wrong: str | None = None
    kind: str = "kind"
    data: DataOptions = field(default_factory=DataOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)


Method = Literal["greedy", "sample", "beam", "best_of_n", "chunk", "mcts", "exact"]


@dataclass(frozen=True)
class DecodeOptions:
    """How answers are decoded. An option that the method does not read is an error, so none is silently ignored.

    Where an option begins with names of methods, these read it, and others do not. Those that are not set take the
    value in brackets.

    Args:
        method: `greedy` takes the likeliest token; `sample` draws; `beam` searches; `best_of_n` draws and keeps the
            best by the objective; `chunk` searches among continuations that are drawn; `mcts` is a tree search,
            `exact` finds the best answer of all, for short ones.
        max_new_tokens: Longest answer, EOS included.
        min_new_tokens: Not mcts, exact: no EOS before so many tokens.
        stop: Not mcts, exact: strings that end an answer; its text is cut before them.
        repetition_penalty: Not mcts, exact: above 1 makes tokens that were said already less likely; 1: no change.
        no_repeat_ngram_size: Not mcts, exact: no sequence of so many tokens occurs twice; 0: no such rule.
        return_sequences: Not greedy: answers a prompt: so many samples, or so many of the best that were found.
        seed: sample, best_of_n, chunk, stochastic beams, gumbel mcts: of what is drawn. Each row of the file has a key
            of its own, whatever batch it is in.
        temperature: sample, best_of_n, chunk: divides log pi before a token is drawn (1).
        top_k: The same: draw among the so many likeliest tokens; 0 for all.
        top_p: The same: among the likeliest tokens whose probabilities reach this sum; 1 for all.
        min_p: The same: among tokens that have at least this fraction of the likeliest one's probability; 0 for all.
        num_samples: best_of_n: answers that are drawn (8).
        rejection_interval: best_of_n: after every so many tokens the worst samples are given up; not set: never.
        rejection_keep: best_of_n: the fraction that stays each time (0.5).
        beams: beam, chunk: width of the search (4).
        preset: beam: does what `hf` (transformers) or `t5x` does, and sets the options that follow.
        eos_rule: beam: which ends of answers are kept: `all`, or those among the `hf` K or `t5x` 2K best candidates of
            a step (all).
        length_rule: beam: divides scores by length ** penalty (`hf`) or ((5 + length) / 6) ** penalty (`gnmt`) (none).
        length_penalty: beam: that exponent, above 0 favours long answers (0; hf 1, t5x 0.6).
        count_prompt: beam: whether these lengths count the prompt (false; t5x true).
        early_stopping: beam: `never` stops a row when nothing can become better, false when nothing is better at its
            present length, true when as many answers as beams have ended (never; hf false).
        truncated: beam: answers that run into the limit `compete`, or are used only if none has ended: `drop`
            (compete; t5x drop).
        groups: beam: so many groups of beams, each avoiding what earlier ones say.
        diversity: beam: what a token costs for each beam of an earlier group that says it, in nats.
        stochastic: beam: draws answers without replacement from the policy instead of searching the best.
        chunk_length: chunk: most tokens of a chunk (16).
        samples: chunk: continuations drawn of each beam (4).
        delimiters: chunk: strings that end a chunk early, such as a line break. A chunk ends after a token whose text
            ends with one of them; a delimiter that takes several tokens is not found.
        num_simulations: mcts: nodes that a tree grows to (64).
        num_actions: mcts: likeliest tokens that a node considers (8).
        selection: mcts: puct or gumbel (puct).
        max_expansions: exact: prefixes that are looked at before it gives up (10000).
        objective: beam, best_of_n, chunk, mcts: what answers are compared by: likelihood, the sum of log pi;
            implicit_reward, of beta * log(pi / pi_ref); regularised_reward, of this and beta * log pi_ref (likelihood;
            best_of_n: implicit_reward).
        beta: Of rewards, in reward a nat; a DPO run carries its own.
        report_reference: Run the reference beside the policy for the columns ref_logp and reward, even where the
            objective does not read it.
        vocabulary: With pairs of models whose vocabularies differ in size: the first so many tokens are the same in
            all, and the others are left out.
    """

    method: Method = "greedy"
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop: list[str] = field(default_factory=list)
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    return_sequences: int = 1
    seed: int = 0
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_samples: int | None = None
    rejection_interval: int | None = None
    rejection_keep: float | None = None
    beams: int | None = None
    preset: Literal["none", "hf", "t5x"] = "none"
    eos_rule: Literal["all", "hf", "t5x"] | None = None
    length_rule: Literal["none", "hf", "gnmt"] | None = None
    length_penalty: float | None = None
    count_prompt: bool | None = None
    early_stopping: bool | Literal["never"] | None = None
    truncated: Literal["compete", "drop"] | None = None
    groups: int = 1
    diversity: float = 0.0
    stochastic: bool = False
    chunk_length: int | None = None
    samples: int | None = None
    delimiters: list[str] = field(default_factory=list)
    num_simulations: int | None = None
    num_actions: int | None = None
    selection: Literal["puct", "gumbel"] | None = None
    max_expansions: int | None = None
    objective: Literal["likelihood", "implicit_reward", "regularised_reward"] | None = None
    beta: float | None = None
    report_reference: bool = False
    vocabulary: int | None = None


@dataclass(frozen=True)
class GuidancePair:
    """A model before and after tuning, whose difference is added to another one.

    Args:
        tuned: Folder or hub name.
        untuned: Folder or hub name.
        weight: Of the difference of their log-probabilities.
    """

    tuned: str
    untuned: str
    weight: float = 1.0


@dataclass(frozen=True)
class GenerateConfig:
    """Answers to prompts: greedy, sampled, searched for, or chosen by reward.

    Answers are written batch by batch. The same command goes on where it was broken off.

    Args:
        model: Folder of a run (or of one of its checkpoints), a Hugging Face folder, or a hub name.
        out: Folder for generations.jsonl, generations.identity.json and config.yaml. Answers already there are kept if
            the same settings, prompts and models made them; otherwise the verb refuses to mix them.
        prompt: One prompt, given here; otherwise `data.eval` is a file with a prompt column.
        reference: Folder or hub name of the reference, for objectives of reward and `decode.report_reference`; a DPO
            run carries its own.
        pairs: Models whose differences guide `model`: the sum of its log-probabilities and of weight * (tuned -
            untuned) is decoded (proxy tuning, emulated fine-tuning, DeRa). Each is {tuned: ..., untuned: ..., weight:
            ...}.
        batch_size: Prompts decoded at once.
    """

    model: str
    out: str
    prompt: str | None = None
    reference: str | None = None
    pairs: list[GuidancePair] = field(default_factory=list)
    batch_size: int = 4
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    data: DataOptions = field(default_factory=DataOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)


@dataclass(frozen=True)
class ExportConfig:
    """A model as a Hugging Face folder, which transformers, PEFT and inference servers read.

    Args:
        model: Folder of a run (or of one of its checkpoints), or anything else that the other verbs open.
        out: Folder to write; it must not hold a model yet.
        part: `model` writes the whole model, an adapter merged into it; `adapter` writes the adapter of a run alone, in
            PEFT's format.
        base: What the adapter's file names as its base; by default the folder or hub name that the run began from.
        dtype: Type of the stored tensors of a model; an adapter is float32.
        max_shard_size: Largest size of a file of weights, such as 5GB or 500MB (a KB is 1,000 bytes). A larger model is
            cut into several files with an index; a tensor that is larger has a file of its own. The default is that of
            huggingface_hub, not the 50GB of transformers 5: export holds one such file in memory beside the model, and
            a broken download loses no more than that.
        mesh: Devices that hold the model meanwhile.
    """

    model: str
    out: str
    part: Literal["model", "adapter"] = "model"
    base: str | None = None
    dtype: Dtype = "float32"
    max_shard_size: str = "5GB"
    mesh: MeshOptions = field(default_factory=MeshOptions)


@dataclass(frozen=True)
class JudgeOptions:
    """Who decides which of two answers is better. An option that the kind does not read is an error.

    Where an option begins with names of kinds, these read it, and others do not.

    Args:
        kind: `true_reward` is the task's own reward, where it is known; `reward_model` scores each answer by a model of
            ours or a classifier, and the larger reward wins; `llm` asks a language model which one is better.
        model: reward_model: folder of a DPO run, whose implicit reward beta * log(pi / pi_ref) is summed over the
            answer, or folder or hub name of a classifier with one label (LlamaForSequenceClassification); llm: name
            of the model at its server.
        tolerance: true_reward, reward_model: rewards that differ by no more than this tie.
        reference: reward_model: folder or hub name of the reference of a language model; a DPO run carries its own.
        beta: The same: temperature of its rewards; a DPO run carries its own.
        as_chat: reward_model: wrap prompt and answer as messages and apply the model's chat template.
        max_length: reward_model: longest prompt and answer together, in tokens; a longer answer loses its end; where a
            classifier reads chats, a longer chat loses its beginning.
        max_prompt_length: reward_model: longest prompt, in tokens; a longer one loses its beginning. Not read by
            classifiers of chats.
        batch_size: reward_model: answers scored at once.
        base_url: llm: address of a server with OpenAI's chat interface, such as http://localhost:8000/v1; not set: the
            client's default. The key is taken from the variable OPENAI_API_KEY only; with an address there may be none.
        prompt: llm: the question: `tldr`, `hh` (both after the paper's), or a text file with {prompt}, {a} and {b}.
        seed: llm: decides, with the texts, which answer is shown first.
        both_orders: llm: ask in both orders; where the two replies disagree, it is a tie.
        retries: llm: further calls where a reply names no letter; a comparison without one is undecided, no tie.
        temperature: llm: of sampling; null leaves it to the server.
        max_tokens: llm: longest reply.
        concurrency: llm: calls on their way at once.
        http_retries: llm: further tries of a request that fails on its way or at the server, after longer and longer
            waits.
        timeout: llm: seconds that a request may take.
        cache: llm: folder of the replies, which are never paid for twice; by default under the user's cache folder.
        price_in: llm: dollars a million tokens of questions, for the estimate before the first call.
        price_out: llm: dollars a million tokens of replies.
        max_cost: llm: dollars; if the estimate is above, nothing is asked, and if repeated calls reach it, no more.
    """

    kind: Literal["true_reward", "reward_model", "llm"] = "reward_model"
    model: str | None = None
    tolerance: float = 1e-6
    reference: str | None = None
    beta: float | None = None
    as_chat: bool = False
    max_length: int = 1024
    max_prompt_length: int = 512
    batch_size: int = 4
    base_url: str | None = None
    prompt: str = "tldr"
    seed: int = 0
    both_orders: bool = False
    retries: int = 2
    temperature: float | None = 0.0
    max_tokens: int = 256
    concurrency: int = 8
    http_retries: int = 5
    timeout: float = 120.0
    cache: str | None = None
    price_in: float | None = None
    price_out: float | None = None
    max_cost: float | None = None


@dataclass(frozen=True)
class SweepConfig:
    """The paper's second insight, measured: win rate, length and reward of answers against the width of beam search.

    Each prompt of `data.eval` is answered with one beam (sampled, and greedy) and with wider ones. A judge compares
    each answer with the one in the file (column `completion`, or `chosen`). Answers are kept, and the same command goes
    on where it was broken off.

    Args:
        model: Folder of a DPO run, or a list of several (of other betas, say), which are drawn as one curve each; the
            first is the one that a report's verdict speaks of.
        out: Folder for sweep.json, sweep.png, comparisons.jsonl and the answers.
        reference: Folder or hub name of the reference; a DPO run carries its own.
        beta: Temperature of the implicit rewards; a DPO run carries its own.
        widths: Beams; a width of 1, sampled and greedy, is always tried too.
        seeds: Of the samples: each prompt is sampled once with each of them.
        temperature: Of the samples; the paper's is 1.
        top_k: Samples are drawn among the so many likeliest tokens; the paper's is 50.
        max_new_tokens: Longest answer, EOS included.
        stop: Strings that end an answer; its text is cut before them.
        batch_size: Prompts decoded, or scored, at once.
        export: Also write the answers and verdicts in alpaca_eval's format, one folder a setting under
            `out`/alpaca_eval.
        judge: Who decides which of two answers is better.
        data: `data.eval` is the file of prompts; where several rows have one prompt, the first of them counts. Rows
            that are not tried stand in sweep.json (`unused_rows`), by reason, counted from 0.
    """

    model: list[str] | str
    out: str
    reference: str | None = None
    beta: float | None = None
    widths: list[int] = field(default_factory=lambda: [2, 3, 5, 7, 10, 20])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    temperature: float = 1.0
    top_k: int = 50
    max_new_tokens: int = 128
    stop: list[str] = field(default_factory=list)
    batch_size: int = 4
    export: bool = False
    judge: JudgeOptions = field(default_factory=JudgeOptions)
    data: DataOptions = field(default_factory=DataOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)


@dataclass(frozen=True)
class DeclineConfig:
    """The paper's third insight, from the metrics of real runs: do rewards of chosen answers fall in training?

    Args:
        out: Folder for decline.json and decline.png.
        with_sft: Folder of a DPO run that began from a model fitted to the chosen answers.
        without_sft: Folder of a DPO run on the same data that did not.
    """

    out: str
    with_sft: str | None = None
    without_sft: str | None = None


@dataclass(frozen=True)
class ReportConfig:
    """One page of what `score --wrong`, `sweep` and `decline` have measured. Any of the three may be left out.

    Args:
        out: Folder for report.html, summary.json and the figures.
        credit: Folder that `qstar score --wrong COLUMN` wrote.
        sweep: Folder that `qstar sweep` wrote.
        decline: Folder that `qstar decline` wrote.
        title: Heading of the page.
        show: How many rows of `credit` to colour on the page.
    """

    out: str
    credit: str | None = None
    sweep: str | None = None
    decline: str | None = None
    title: str = "Your language model is a Q-function"
    show: int = 6


@dataclass(frozen=True)
class DemoConfig:
    """The paper's insights in minutes, on two CPU cores, offline: a small summarisation task with a known reward.

    Args:
        out: Folder for report.html, summary.json, and the runs.
        from_scratch: First pretrain the base model again instead of taking the one in the package.
        seed: Of the task's posts and of the order of the rows.
    """

    out: str = "runs/demo"
    from_scratch: bool = False
    seed: int = 0


@dataclass(frozen=True)
class EnvConfig:
    """Versions, devices and tested pairs: what to paste into a bug report."""
