"""Real tokenizers, against `apply_chat_template` of transformers."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from qstar_jax.config import DataOptions
from qstar_jax.data.batches import make_batch
from qstar_jax.data.loading import load_examples
from qstar_jax.data.packing import Shapes
from qstar_jax.data.steps import find_steps, parse_delimiter
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.errors import InputError
from qstar_jax.evaluation.pieces import token_pieces
from qstar_jax.store import hub

pytestmark = [pytest.mark.real, pytest.mark.slow]

END = {
    "gemma3": "<end_of_turn>",
    "gptoss": "<|return|>",
    "llama3_1": "<|eot_id|>",
    "mistral_nemo": "</s>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
}
BOS = {"gemma3": "<bos>", "llama3_1": "<|begin_of_text|>", "mistral_nemo": "<s>"}  # the others put nothing before texts


of_chats = pytest.mark.parametrize("name", sorted(END.keys() - {"gptoss"}), indirect=True)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Answer in one word."}
DIALOGUES = {
    "one turn": ([user("What is 6 * 7? 🙂")], "It's 42.", "Forty-two:\n\n  I think. 漢字"),
    "system": ([SYSTEM, user("Hi there")], "Hello", "Hey!"),
    "several turns": ([user("Hi"), assistant("Hello!"), user("And\n\nbye?")], "Bye.", "See you 👋🏽"),
    "system, several turns": ([SYSTEM, user("1"), assistant("2"), user("3"), assistant("4"), user("5")], "6", "7 "),
}


@pytest.fixture
def read(eos_ids, tokenizer, tmp_path):
    """`read(rows, kind, **arguments of the template)`: examples of rows, as a model of this tokenizer reads them."""

    def make(rows, kind="preferences", **arguments):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = DataOptions(chat_template_kwargs=arguments)
        known = {"vocabulary": len(tokenizer), "eos_ids": eos_ids}
        return load_examples(str(path), "", kind, tokenizer, options, **known).examples

    return make


def preference(prompt, chosen, rejected):
    chosen, rejected = ([assistant(text) if isinstance(text, str) else text] for text in (chosen, rejected))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def ids_of(tokenizer, messages, **arguments):
    """What transformers makes of a dialogue."""
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **arguments)["input_ids"]


def without_blanks(text):
    return "".join(text.split())


def switches(name):
    return [{}, {"enable_thinking": False}] if name == "qwen3" else [{}]


@of_chats
@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_dialogues_have_the_tokens_of_transformers(name, dialogue, tokenizer, read):
    row = preference(*DIALOGUES[dialogue])
    if name == "mistral_nemo" and SYSTEM in row["prompt"]:  # which shows it before a last turn of the user only
        with pytest.raises(InputError, match=r"renders the prompt differently when .*Answer in one word"):
            read([row])
        return
    for arguments in switches(name):
        [example] = read([row], **arguments)
        opened = ids_of(tokenizer, row["prompt"], add_generation_prompt=True, **arguments)
        assert example.prompt.tolist() == opened
        for answer, response in zip((row["chosen"], row["rejected"]), example.responses, strict=True):
            whole = ids_of(tokenizer, row["prompt"] + answer, **arguments)
            ids = [*opened, *response.ids.tolist()]
            assert ids == whole[: len(ids)] and not tokenizer.decode(whole[len(ids) :]).strip()
            assert tokenizer.convert_ids_to_tokens(ids).count(BOS.get(name)) == int(name in BOS)
            assert tokenizer.convert_ids_to_tokens(ids)[-1] == END[name] and not response.truncated
            said = tokenizer.decode(response.ids, clean_up_tokenization_spaces=False)
            assert without_blanks(said).endswith(without_blanks(answer[0]["content"] + END[name]))
            assert "".join(token_pieces(response.ids, tokenizer)) == said


def test_steps_end_with_their_delimiter_whatever_it_merges_with(tokenizer):
    """Llama's and Qwen's vocabularies have tokens such as ".\\n\\n", and a space may begin the next word's token."""
    text = "She has 3 + 4 = 7.\n\nSo 16 - 7 = 9 are left.\nShe makes 18.\n\n\nThat is $18."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_pieces(ids, tokenizer)

    def steps(option):
        found = find_steps(pieces, [0] * len(ids), parse_delimiter(option))
        return ["".join(p for p, s in zip(pieces, found, strict=True) if s == step) for step in sorted(set(found))]

    lines = ["She has 3 + 4 = 7.\n\n", "So 16 - 7 = 9 are left.\n", "She makes 18.\n\n\n", "That is $18."]
    assert steps(r"\n") == lines and steps(r"re:\.\n+") == lines
    assert [step.strip("\n") for step in steps(r"\n\n")] == [
        "She has 3 + 4 = 7.", "So 16 - 7 = 9 are left.\nShe makes 18.", "That is $18."
    ]  # fmt: skip
    assert steps(r"\n\n")[0] == lines[0]  # the delimiter belongs to the step that it ends


@of_chats
@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_prompts_for_decoding_are_those_of_transformers(name, dialogue, tokenizer, read):
    prompt = DIALOGUES[dialogue][0]
    for arguments in switches(name):
        [example] = read([{"prompt": prompt}], "prompts", **arguments)
        expected = ids_of(tokenizer, prompt, add_generation_prompt=True, **arguments)
        assert example.prompt.tolist() == expected and example.responses == ()


@of_chats
def test_ends_of_turns_are_learnt_and_end_answers(name, eos_ids, tokenizer, read, tmp_path):
    dialogues = [dialogue for dialogue in DIALOGUES.values() if name != "mistral_nemo" or SYSTEM not in dialogue[0]]
    examples = read([preference(*dialogue) for dialogue in dialogues])
    batch = make_batch(examples, Shapes.of(examples, batch_size=len(examples), row_length=512))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_ids}))
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=len(tokenizer)))
    generation = hub.read_generation_config(tmp_path)
    ends = eos_token_ids(SimpleNamespace(model=model, tokenizer=tokenizer, generation=generation))
    assert ends == tuple(sorted({*eos_ids, tokenizer.eos_token_id}))
    learnt = batch.targets.reshape(-1)[batch.index]
    for row, example in enumerate(examples):
        for r, response in enumerate(example.responses):
            assert learnt[row, r][batch.action_mask[row, r]].tolist() == response.ids.tolist()
            assert np.isin(response.ids, ends).tolist() == [False] * (len(response.ids) - 1) + [True]


@pytest.mark.parametrize("marked", [False, True], ids=["", "with BOS in the text"])
def test_plain_text_has_one_bos_and_one_end(name, marked, tokenizer, read):
    prompt, answers = "POST: It's naïve, she said.\n\nTL;DR:", (" Nothing happened. 🙂", "\n\n漢字")
    [example] = read([{"prompt": BOS.get(name, "") * marked + prompt, "chosen": answers[0], "rejected": answers[1]}])
    assert example.prompt.tolist() == tokenizer(prompt).input_ids
    for text, response in zip(answers, example.responses, strict=True):
        ids = [*example.prompt.tolist(), *response.ids.tolist()]
        said = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert said == BOS.get(name, "") + prompt + text + tokenizer.eos_token
        assert "".join(token_pieces(response.ids, tokenizer)) == text + tokenizer.eos_token


def test_what_travels_with_a_run_is_the_same_tokenizer(name, tokenizer):
    again = hub.build_tokenizer(hub.tokenizer_files(tokenizer))
    assert (again.chat_template, again.eos_token) == (tokenizer.chat_template, tokenizer.eos_token)
    for text in ("Hello  world, it's 12345!\n\n\tÜber 漢字。 🙂", " leading", f"a{END[name]}b <|im_start|>x</s><eos>"):
        assert again(text).input_ids == tokenizer(text).input_ids, text


@of_chats
def test_thoughts(name, tokenizer, read):
    """Qwen3 shows those of the answer and none of earlier turns; templates that know none keep them as they are."""
    thought = "<think>\nHm.\n</think>\n\nFour."
    earlier = [user("2 + 2?"), assistant(thought), user("Sure?")]
    [example] = read([preference(earlier, thought.replace("Four", "Yes"), "No.")])
    assert example.prompt.tolist() == ids_of(tokenizer, earlier, add_generation_prompt=True)
    assert ("Hm." in tokenizer.decode(example.prompt)) == (name != "qwen3")
    chosen, rejected = (tokenizer.decode(response.ids) for response in example.responses)
    assert chosen == "<think>\nHm.\n</think>\n\nYes." + END[name]
    assert rejected == "<think>\n\n</think>\n\n" * (name == "qwen3") + "No." + END[name]
    apart = preference([user("2 + 2?")], assistant("Four.", reasoning_content="Hm."), "Five.")
    if name == "qwen3":
        [example] = read([apart])
        assert tokenizer.decode(example.responses[0].ids) == thought + END[name]
    else:
        with pytest.raises(InputError, match="the chat template omits reasoning_content; choose one that"):
            read([apart])


@pytest.mark.parametrize("name", ["qwen3"], indirect=True)
def test_thoughts_that_would_be_lost_are_refused(name, tokenizer, read):
    row = preference([user("2 + 2?")], "<think>\nHm.\n</think>\n\nFour.", "<think>\nHa.\n</think>\n\nFive.")
    message = (
        r"row 1: the chat template renders the prompt differently when a response follows .*<think>\\n' the prompt"
        r" alone has '\\n</think>.*with the response 'Hm\."
    )
    with pytest.raises(InputError, match=message):
        read([row], enable_thinking=False)
    row = preference([user("2 + 2?")], "Wait. <think>Hm.</think>Four.", "Five.")
    with pytest.raises(InputError, match="row 1: the chat template omits all words of the response"):
        read([row])
    with pytest.raises(InputError, match="row 1: the chat template omits messages of the role 'developer'"):
        read([preference([{"role": "developer", "content": "Be brief."}, user("2 + 2?")], "Four.", "Five.")])


@pytest.mark.parametrize(
    ("name", "config"),
    [("qwen3", "dpo_qwen3"), ("gemma3", "dpo_gemma3"), ("llama3_1", "dpo_llama3")],
    indirect=["name"],
)
def test_our_configurations_learn_an_answer_and_its_end(name, config, tokenizer, read):
    file = Path(__file__).parents[2] / "configs" / f"{config}.yaml"
    options = yaml.safe_load(file.read_text())["data"]
    [example] = read([preference([user("Hi")], "Hello.", "Hey!")], **options.get("chat_template_kwargs", {}))
    assert [tokenizer.decode(response.ids) for response in example.responses] == [
        f"Hello.{END[name]}",
        f"Hey!{END[name]}",
    ]


@pytest.mark.parametrize("name", ["qwen2_5"], indirect=True)
def test_an_answer_that_merges_with_its_opening_takes_the_whole_token(name, tokenizer, read):
    prompt, answers = [user("Hi")], ("\n\n漢字", "ok")
    [example] = read([preference(prompt, *answers)])
    opened = ids_of(tokenizer, prompt, add_generation_prompt=True)
    assert example.prompt.tolist() == opened[:-1]
    for text, response in zip(answers, example.responses, strict=True):
        whole = ids_of(tokenizer, [*prompt, assistant(text)])
        assert [*example.prompt.tolist(), *response.ids.tolist()] == whole[:-1]  # without the line's end behind it


@pytest.mark.parametrize("name", ["gptoss"], indirect=True)
def test_a_tokenizer_without_a_template_reads_no_chats(name, read):
    with pytest.raises(InputError, match="no chat template; use the tokenizer of an instruction-tuned model"):
        read([preference([user("Hi")], "Hello", "Hey")])
