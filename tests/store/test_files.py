import pytest

from qstar_jax.store.files import write_atomically, write_json


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "notes.txt"
    write_atomically(file, b"first version")
    write_atomically(file, b"second")
    assert file.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "notes.txt"
    write_atomically(file, b"first version")
    with pytest.raises(TypeError):
        write_atomically(file, "text instead of bytes")
    assert file.read_bytes() == b"first version"
    assert list(tmp_path.iterdir()) == [file]


def test_json_is_indented_and_ends_with_a_line_break(tmp_path):
    write_json(tmp_path / "summary.json", {"steps": 2, "loss": 0.5})
    assert (tmp_path / "summary.json").read_text() == '{\n  "steps": 2,\n  "loss": 0.5\n}\n'
