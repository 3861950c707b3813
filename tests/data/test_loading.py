import json

import pytest

from qstar_jax.config import DataOptions
from qstar_jax.data.dropped import Dropped
from qstar_jax.data.loading import load_examples
from qstar_jax.errors import InputError

OPTIONS = DataOptions(max_length=8, max_prompt_length=4)


def write(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_rows_dropped_at_either_stage_are_counted_together(tmp_path, plain_tokenizer):
    rows = [pair("a", "b", "b"), pair("", "b", "c"), pair("a", "b", "c"), pair("", "d", "e")]
    data = load_examples(write(tmp_path, *rows), "train", "preferences", plain_tokenizer, OPTIONS)
    assert data.dropped == (
        Dropped(0, "chosen equals rejected"),
        Dropped(1, "empty prompt"),
        Dropped(3, "empty prompt"),
    )
    assert [example.row for example in data.examples] == [2]


def test_summary(tmp_path, plain_tokenizer):
    rows = [pair("abcdef", "b", "cdefghijk"), pair("a", "b", "cde"), pair("a", "b", "b")]
    source = write(tmp_path, *rows)
    assert load_examples(source, "train", "preferences", plain_tokenizer, OPTIONS).summary == (
        f"{source}: 3 rows read, 2 used; 1 dropped (1 chosen equals rejected); "
        "prompts have 2.5 tokens on average, 4 at most, 50.0% truncated; "
        "answers have 3.0 tokens on average, 4 at most, 25.0% truncated."
    )


def test_prompts_and_limit(tmp_path, plain_tokenizer):
    source = write(tmp_path, {"prompt": "abc"}, {"prompt": "d"}, {"prompt": "e"})
    data = load_examples(source, "train", "prompts", plain_tokenizer, OPTIONS, limit=2)
    assert len(data.examples) == 2 and data.examples[0].responses == ()
    assert (
        data.summary == f"{source}: 2 rows read, 2 used; prompts have 2.0 tokens on average, 3 at most, 0.0% truncated."
    )


def test_completions(tmp_path, plain_tokenizer):
    data = load_examples(write(tmp_path, pair("a", "b", "c")), "train", "completions", plain_tokenizer, OPTIONS)
    assert [len(response.ids) for response in data.examples[0].responses] == [2]


def test_nothing_left_after_tokenisation(tmp_path, plain_tokenizer):
    source = write(tmp_path, pair("", "b", "c"), pair("a", "b", "b"))
    with pytest.raises(
        InputError, match=r"none of its 2 rows can be used \(1 empty prompt, 1 chosen equals rejected\)"
    ):
        load_examples(source, "train", "preferences", plain_tokenizer, OPTIONS)
