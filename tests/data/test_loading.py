import json
from dataclasses import replace

import pytest

from qstar_jax.config import DataOptions
from qstar_jax.data.dropped import Dropped
from qstar_jax.data.loading import load_examples
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM

OPTIONS = DataOptions(max_length=8, max_prompt_length=4)


def write(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_a_file_becomes_examples(tmp_path, plain_tokenizer):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "ab", "chosen": "cd", "rejected": "e"}\n')
    data = load_examples(str(path), "train", "preferences", plain_tokenizer, OPTIONS)
    [example] = data.examples
    assert plain_tokenizer.decode(example.prompt) == "ab"
    assert [plain_tokenizer.decode(response.ids) for response in example.responses] == ["cd[E]", "e[E]"]
    assert data.dropped == ()


def test_rows_dropped_at_either_stage_are_counted_together(tmp_path, plain_tokenizer):
    rows = [pair("a", "b", "b"), pair("", "b", "c"), *[pair("a", "b", "c")] * 17, pair("", "d", "e")]
    data = load_examples(write(tmp_path, *rows), "train", "preferences", plain_tokenizer, OPTIONS)
    assert data.dropped == (
        Dropped(0, "chosen equals rejected"),
        Dropped(1, "empty prompt"),
        Dropped(19, "empty prompt"),
    )
    assert [example.row for example in data.examples] == list(range(2, 19))


def test_the_summary_counts_rows_and_tokens(tmp_path, plain_tokenizer):
    rows = [pair("abcdef", "b", "cdefghijk"), pair("a", "b", "cde"), pair("a", "b", "b")]
    source = write(tmp_path, *rows)
    assert load_examples(source, "train", "preferences", plain_tokenizer, OPTIONS).summary == (
        f"{source}: 3 rows read, 2 used; 1 dropped: 1 chosen equals rejected (row 3); "
        "prompts have 2.5 tokens on average, 4 at most, 1 (50.0%) truncated at the beginning (row 1); "
        "responses have 3.0 tokens on average, 4 at most, 1 (25.0%) truncated at the end (row 1)."
    )


def test_rows_beyond_the_positions_of_a_model_are_reported(tmp_path, plain_tokenizer, tiny_config):
    data = load_examples(write(tmp_path, pair("abc", "b", "cde")), "train", "preferences", plain_tokenizer, OPTIONS)
    assert (data.longest(), data.longest(9)) == (3 + 4, 3 + 9)
    model = CausalLM.from_hf(tiny_config | {"max_position_embeddings": 7})
    assert data.report(model) == data.summary
    warning = f"warning: {data.source}, longest prompt and response: 8 tokens exceed the model's context of 7"
    assert data.report(model, 5).startswith(f"{data.summary}\n{warning}")


def test_prompts_and_limit(tmp_path, plain_tokenizer):
    source = write(tmp_path, {"prompt": "abc"}, {"prompt": "d"}, {"prompt": "e"})
    data = load_examples(source, "train", "prompts", plain_tokenizer, OPTIONS, limit=2)
    assert len(data.examples) == 2 and data.examples[0].responses == ()
    assert (
        data.summary == f"{source}: 2 rows read, 2 used; prompts have 2.0 tokens on average, 3 at most, none truncated."
    )


def test_completions(tmp_path, plain_tokenizer):
    data = load_examples(write(tmp_path, pair("a", "b", "c")), "train", "completions", plain_tokenizer, OPTIONS)
    assert [len(response.ids) for response in data.examples[0].responses] == [2]


def test_nothing_left_after_tokenization(tmp_path, plain_tokenizer):
    source = write(tmp_path, pair("", "b", "c"), pair("a", "b", "b"))
    with pytest.raises(
        InputError,
        match=r"none of its 2 rows can be used \(1 empty prompt \(row 1\), 1 chosen equals rejected \(row 2\)\)",
    ):
        load_examples(source, "train", "preferences", plain_tokenizer, OPTIONS)


HALF = pair("a", "b\ud83d", "c")


@pytest.mark.parametrize("bad", [HALF, {"prompt": "a"}, {**HALF, "chosen": None}, 3, pair("", "b", "c")])
def test_a_bad_row_among_many(tmp_path, plain_tokenizer, bad):
    source = write(tmp_path, *[pair("a", "b", "c")] * 4, bad, *[pair("a", "b", "c")] * 5)
    data = load_examples(source, "train", "preferences", plain_tokenizer, OPTIONS)
    assert [example.row for example in data.examples] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    [dropped] = data.dropped
    assert f"10 rows read, 9 used; 1 dropped: 1 {dropped.reason} (row 5); prompts" in data.summary
    with pytest.raises(InputError) as stopped:
        load_examples(source, "train", "preferences", plain_tokenizer, replace(OPTIONS, bad_rows="stop"))
    assert str(stopped.value).startswith(f"{source} row 5: {dropped.fault}; fix the row, or")
    source = write(tmp_path, *[pair("a", "b", "c")] * 4, bad)
    with pytest.raises(InputError) as too_many:
        load_examples(source, "train", "preferences", plain_tokenizer, OPTIONS)
    message = f"too many bad rows to drop (1 of 5; at most a tenth may be bad): 1 {dropped.reason} (row 5);"
    assert message in str(too_many.value)


def test_the_summary_names_the_first_truncated_rows(tmp_path, plain_tokenizer):
    rows = [pair("a", "b", "c"), *[pair("abcde", "bcdefgh", "cdefghi")] * 4]
    summary = load_examples(write(tmp_path, *rows), "train", "preferences", plain_tokenizer, OPTIONS).summary
    assert "4 (80.0%) truncated at the beginning (row 2, 3, 4, ...)" in summary
    assert "8 (80.0%) truncated at the end (row 2, 3, 4, ...)" in summary


def test_the_summary_reports_removed_prompts(tmp_path, plain_tokenizer):
    data = load_examples(write(tmp_path, pair("a", "a b", "a c")), "train", "preferences", plain_tokenizer, OPTIONS)
    assert [plain_tokenizer.decode(r.ids) for r in data.examples[0].responses] == [" b[E]", " c[E]"]
    assert "Responses repeated their prompt, which was removed: 1 (row 1);" in data.summary


def test_a_broken_line_does_not_shift_row_numbers(tmp_path, plain_tokenizer):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(pair("a", "b", "c"))] * 20
    path.write_text("\n".join([*lines[:2], "{", *lines[3:9], json.dumps(pair("a", "b", "b")), *lines[10:]]))
    data = load_examples(str(path), "train", "preferences", plain_tokenizer, OPTIONS)
    assert data.dropped == (Dropped(2, "not valid JSON"), Dropped(9, "chosen equals rejected"))
    assert [example.row for example in data.examples] == [row for row in range(20) if row not in (2, 9)]


def test_a_configuration_needs_a_dataset_on_the_hub(tmp_path, plain_tokenizer, monkeypatch):
    import datasets

    def load_dataset(source, name, *, split):
        return datasets.Dataset.from_list([pair("a", name, "c")])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source, options = write(tmp_path, pair("a", "b", "c")), replace(OPTIONS, name="x")
    data = load_examples("owner/set", "train", "preferences", plain_tokenizer, options)
    assert plain_tokenizer.decode(data.examples[0].responses[0].ids) == "x[E]"
    with pytest.raises(InputError, match=r"data.name x has no effect: .* is not on the Hub"):
        load_examples(source, "train", "preferences", plain_tokenizer, options)
    load_examples(source, "train", "preferences", plain_tokenizer, replace(options, train="owner/set", eval=source))
