import pytest

from qstar_jax.errors import InputError
from qstar_jax.evaluation.judges.replies import Reply, ReplyCache, reply_key


def lines(folder):
    return (folder / "replies.jsonl").read_bytes().splitlines()


def test_replies_are_read_back(tmp_path):
    folder = tmp_path / "new" / "folder"
    cache = ReplyCache(folder)
    assert not folder.exists()
    with cache:
        cache.put("k1", Reply("é\n\u2028A", 3, 4), "m")
        cache.put("k2", Reply(""), "m")
        assert len(lines(folder)) == 2  # written before the file is closed
    again = ReplyCache(folder)
    assert again.get("k1") == Reply("é\n\u2028A", 3, 4) and again.get("k2") == Reply("") and again.get("k3") is None


@pytest.mark.parametrize("tail", [b'{"key": "half", "rep', b"\xff\xfe", b'{"key": "k"}\n', b"[]\n", b"\n"])
def test_a_broken_line_costs_itself_only(tail, tmp_path):
    with ReplyCache(tmp_path) as cache:
        cache.put("k1", Reply("A"), "m")
    with (tmp_path / "replies.jsonl").open("ab") as file:
        file.write(tail)
    cache = ReplyCache(tmp_path)
    assert len(cache) == 1
    with cache:
        cache.put("k2", Reply("B"), "m")
    with ReplyCache(tmp_path) as cache:
        cache.put("k3", Reply("C"), "m")
    again = ReplyCache(tmp_path)
    assert [again.get(key).text for key in ("k1", "k2", "k3")] == ["A", "B", "C"]


def test_without_a_folder_replies_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ReplyCache(None) as cache:
        cache.put("k", Reply("A"), "m")
    assert cache.get("k") == Reply("A") and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_known_before_any_call(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*judge\.cache"), ReplyCache(tmp_path / "file"):
        pass


def test_the_key_is_of_all_that_decides():
    base = ["m", "http://x", [{"role": "user", "content": "q"}], {"temperature": 0.0}, 0]
    others = ["n", "http://y", [{"role": "user", "content": "r"}], {"temperature": 1.0}, 1]
    keys = {reply_key(*base)} | {reply_key(*base[:i], other, *base[i + 1 :]) for i, other in enumerate(others)}
    assert len(keys) == 6 and all(len(key) == 64 for key in keys)
