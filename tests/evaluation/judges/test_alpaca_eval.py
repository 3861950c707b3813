import json

from qstar_jax.evaluation.judges import Comparison, Verdict, win_rate
from qstar_jax.evaluation.judges.alpaca_eval import export

COMPARISONS = [Comparison(row, f"ask {row}", f"model é {row}", f"base {row}") for row in (3, 4, 7, 9)]
VERDICTS = [Verdict(1.0, note="clear"), Verdict(0.5), Verdict(0.0), Verdict(None, note="undecided")]
NAMES = {"generator": "policy", "baseline": "human", "annotator": "judge"}


def test_the_format(tmp_path):
    files = export(tmp_path / "new", COMPARISONS, VERDICTS, **NAMES)
    outputs, references, annotations = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    assert [path.name for path in files] == ["model_outputs.json", "reference_outputs.json", "annotations.json"]
    assert outputs[0] == {"instruction": "ask 3", "output": "model é 3", "generator": "policy"}
    assert references[0] == {"instruction": "ask 3", "output": "base 3", "generator": "human"}
    assert annotations[0] == {
        "instruction": "ask 3",
        "output_1": "base 3",
        "generator_1": "human",
        "output_2": "model é 3",
        "generator_2": "policy",
        "annotator": "judge",
        "preference": 2.0,
        "row": 3,
        "note": "clear",
    }
    assert [record["preference"] for record in annotations] == [2.0, 1.5, 1.0, None]


def test_the_win_rate_is_the_one_of_the_files_alone(tmp_path):
    path = export(tmp_path, COMPARISONS, VERDICTS, **NAMES)[-1]
    preferences = [record["preference"] for record in json.loads(path.read_text(encoding="utf-8"))]
    decided = [preference - 1 for preference in preferences if preference is not None]
    assert sum(decided) / len(decided) == win_rate(VERDICTS).rate == 0.5
