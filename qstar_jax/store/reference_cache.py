"""A frozen reference's log-probabilities on disk: later runs on the same data need not load its parameters at all.

A cache is the folder `<folder>/<key>/`. The key is a `fingerprint` of all that the numbers depend on, so a cache is
never stale: other data, another tokenizer or another reference have another folder. It holds `part-NNNNNN.safetensors`,
each with the next `PART_EXAMPLES` examples, and, written last, `complete.json` with a digest of all parts.

Files appear under their names whole (os.replace) and in order, and one that is there is never written again. The cuts
between parts do not depend on batch sizes, so two runs that fill the same cache at once make the same files: whoever
comes second at a part keeps what is there. In the instant between looking and replacing both may write it, which
changes nothing if their numbers are the same bits; if they are not (another kind of device), and the digest was taken
just between, reading says so.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qstar_jax.data.tokenization import Example
from qstar_jax.errors import InputError
from qstar_jax.store.files import write_atomically, write_json
from qstar_jax.store.identity import digest_examples

PART_EXAMPLES = 256  # examples a file: what a run that breaks has to compute again, at most
_FORMAT = "qstar_jax reference cache 1"  # changes with the files' form, so that caches of another form are not found


def fingerprint(dataset_examples: Sequence[Example], ref_identity: str, dtype: str) -> str:
    """Digests all that a reference's log-probabilities depend on.

    Rows' numbers and flags of truncation are left out, since no log-probability depends on them.

    Args:
        dataset_examples: Prompts and answers as tokens, in order: they stand for data, tokenizer and truncation.
        ref_identity: `identity.weights_identity` of the reference: its parameters and its configuration (the base
            of its rotary positions, for instance, is not a parameter).
        dtype: Type of its activations, `compute.dtype`.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, ref_identity, dtype, len(dataset_examples)]).encode())
    digest_examples(digest, dataset_examples)
    return digest.hexdigest()


class ReferenceCache:
    """The log-probabilities of one data set's answers under one reference, in nats. See `open`.

    In a job of several processes the main one alone may call `write`; the caller sees to that, and to it that the
    others wait before they `read`. No other method touches the disk but to read.

    Attributes:
        path: Folder of the cache; it is made by the first `write`.
        key: Its fingerprint.
    """

    def __init__(self, path: Path, key: str, examples: Sequence[Example]):
        self.path, self.key = path, key
        self._examples = examples
        self._parts = [path / f"part-{i:06d}.safetensors" for i in range(-(-len(examples) // PART_EXAMPLES))]
        self._seal = path / "complete.json"
        self._done = 0
        self._pending: list[list[np.ndarray]] = []

    @classmethod
    def open(cls, folder: Path, key: str, examples: Sequence[Example]) -> "ReferenceCache":
        """Finds out how much of a cache is there, and checks it as far as that is cheap or a run will go on with it.

        Args:
            folder: Where caches are kept; need not exist.
            key: `fingerprint` of `examples` and the reference.
            examples: At least one; they may have any numbers of answers.

        Returns:
            The cache; empty if there is none under this key.

        Raises:
            InputError: If a file is damaged, does not belong here, or lies behind a gap.
        """
        cache = cls(Path(folder) / key, key, examples)
        cache._done = cache._scan()
        return cache

    @property
    def done(self) -> int:
        """How many leading examples are on disk: where a run that broke goes on.

        Those of the last part count when `complete.json` is there too, so going on always ends in a complete cache.
        """
        return self._done

    @property
    def complete(self) -> bool:
        """All examples are on disk, whoever wrote them."""
        return self._seal.is_file()

    def write(self, start: int, logps: Sequence[Sequence[np.ndarray]]):
        """Appends consecutive examples; they reach the disk when a part is full, or with the last example.

        Args:
            start: Index of the first of them: `done` at first, then where the last call ended.
            logps: For each example, for each answer: log-probabilities in nats of its tokens, shape [T].

        Raises:
            InputError: If a number is not finite, or a part that is there already is damaged.
            ValueError: If `start` leaves a gap or writes twice, or shapes are not those of the examples.
        """
        expected = self._done + len(self._pending)
        if start != expected or start + len(logps) > len(self._examples):
            raise ValueError(
                f"examples {start} to {start + len(logps)} written; expected to begin at {expected} and to end at "
                f"{len(self._examples)} at most"
            )
        rows = list(zip(self._examples[start : start + len(logps)], logps, strict=True))
        self._pending += [_checked(example, answers) for example, answers in rows]
        while self._pending and len(self._pending) >= self._size(self._done // PART_EXAMPLES):
            number = self._done // PART_EXAMPLES
            size = self._size(number)
            self._write_part(number, self._pending[:size])
            del self._pending[:size]
            self._done += size
            if self._done == len(self._examples):
                write_json(self._seal, self._summary())

    def read(self) -> list[list[np.ndarray]]:
        """Reads a complete cache, and verifies its digest.

        Returns:
            For each example, for each answer: log-probabilities in nats of its tokens, float32 [T], read-only.

        Raises:
            InputError: If the cache is not complete, or a file is damaged.
        """
        if not self.complete:
            raise InputError(
                f"{self.path}: not complete ({self._done} of {len(self._examples)} examples); go on writing at `done`"
            )
        sealed = self._read_seal()
        digest, logps = hashlib.sha256(), []
        for number in range(len(self._parts)):
            content, part = self._read_part(number)
            digest.update(content)
            logps += part
        if digest.hexdigest() != sealed["sha256"]:
            raise self._damaged(self._seal, "its digest is not that of the parts")
        return logps

    def verify(self, sample: Sequence[int], logps: Sequence[Sequence[np.ndarray]], tolerance: float = 1e-3):
        """Compares log-probabilities that were just computed with those on disk.

        Args:
            sample: Indices of a few examples, each of them below `done`.
            logps: For each of them, for each answer: log-probabilities in nats of its tokens, shape [T].
            tolerance: Largest difference allowed, in nats a token. In bfloat16 another batch size alone may change
                more than the default.

        Raises:
            InputError: If one differs by more; the example that differs most is named.
            ValueError: If an example is not on disk, or shapes are not those of the examples.
        """
        there = len(self._examples) if self.complete else self._done
        if not all(0 <= index < there for index in sample):
            raise ValueError(f"examples {list(sample)} to be compared; only {there} are on disk")
        parts = {number: self._read_part(number)[1] for number in sorted({index // PART_EXAMPLES for index in sample})}
        worst, row = 0.0, None
        for index, answers in zip(sample, logps, strict=True):
            example, cached = self._examples[index], parts[index // PART_EXAMPLES][index % PART_EXAMPLES]
            _check_shapes(example, answers)
            for new, old in zip(answers, cached, strict=True):
                gaps = np.nan_to_num(np.abs(np.asarray(new, np.float32) - old), nan=np.inf, posinf=np.inf)
                if gaps.max(initial=0.0) > worst:
                    worst, row = float(gaps.max()), example.row + 1
        if worst > tolerance:
            raise InputError(
                f"{self.path}: the cached log-probabilities of row {row} differ by up to {worst:.3g} nats a token from "
                f"those just computed (tolerance {tolerance:g}), so another model or program wrote them; delete this "
                "folder and run again"
            )

    def _scan(self) -> int:
        # Writers add files in order, perhaps while this looks: if the last is looked for first, what was there before
        # it will be found too.
        sealed = self.complete
        there = [file.is_file() for file in reversed(self._parts)][::-1]
        for file in sorted(self.path.glob("part-*")):
            if file not in self._parts:
                raise self._damaged(file, f"not a part of this cache, which has {len(self._parts)}")
        if sealed:
            self._read_seal()
            if not all(there):
                raise self._damaged(self._parts[there.index(False)], f"missing, though there is a {self._seal.name}")
            return len(self._examples)  # `read` looks at the rest
        leading = (there.index(False) if False in there else len(there)) if there else 0
        if any(there[leading:]):
            after = self._parts[there.index(True, leading)]
            raise self._damaged(after, f"the part before it, {self._parts[leading].name}, is missing")
        for number in range(leading):
            self._read_part(number)
        return min(leading, len(self._parts) - 1) * PART_EXAMPLES

    def _of_part(self, number: int) -> Sequence[Example]:
        return self._examples[number * PART_EXAMPLES : (number + 1) * PART_EXAMPLES]

    def _size(self, number: int) -> int:
        return len(self._of_part(number))

    def _lengths(self, number: int) -> np.ndarray:
        return np.array([len(response.ids) for e in self._of_part(number) for response in e.responses], np.int32)

    def _digest(self, number: int, lengths: np.ndarray, logps: np.ndarray) -> np.ndarray:
        """Finds what a crash or a disk did to a part before `complete.json` covers it, or a part of another place."""
        digest = hashlib.sha256(f"{self.key} {number} ".encode())
        digest.update(lengths.astype("<i4"))
        digest.update(logps.astype("<f4"))
        return np.frombuffer(digest.digest(), np.uint8)

    def _write_part(self, number: int, answers: list[list[np.ndarray]]):
        from safetensors.numpy import save

        if self._parts[number].exists():  # another run was here first
            self._read_part(number)
            return
        lengths = self._lengths(number)
        logps = np.concatenate([np.zeros(0, np.float32), *(values for example in answers for values in example)])
        arrays = {"logps": logps, "lengths": lengths, "sha256": self._digest(number, lengths, logps)}
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self._parts[number], save(arrays))

    def _read_part(self, number: int) -> tuple[bytes, list[list[np.ndarray]]]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        file, lengths = self._parts[number], self._lengths(number)
        try:
            content = file.read_bytes()
            arrays = load(content)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(file, f"not a readable safetensors file ({error})") from error
        found = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
        expected = {
            "logps": ("float32", (int(lengths.sum()),)),
            "lengths": ("int32", lengths.shape),
            "sha256": ("uint8", (32,)),
        }
        if found != expected:
            raise self._damaged(file, f"holds {found}; expected {expected}")
        if not np.array_equal(arrays["lengths"], lengths):
            raise self._damaged(file, "its answers have other lengths than those of the data")
        if not np.array_equal(arrays["sha256"], self._digest(number, lengths, arrays["logps"])):
            raise self._damaged(file, "its digest is not that of its numbers, or it was written for another place")
        pieces = iter(np.split(arrays["logps"], np.cumsum(lengths)))
        return content, [[next(pieces) for _ in example.responses] for example in self._of_part(number)]

    def _summary(self) -> dict[str, str | int]:
        """What `complete.json` says; the digest is that of the bytes on disk, which another run may have written."""
        digest = hashlib.sha256()
        for number in range(len(self._parts)):
            digest.update(self._read_part(number)[0])
        return {**self._counts(), "sha256": digest.hexdigest()}

    def _counts(self) -> dict[str, str | int]:
        tokens = sum(len(response.ids) for example in self._examples for response in example.responses)
        return {"key": self.key, "examples": len(self._examples), "tokens": tokens}

    def _read_seal(self) -> dict[str, str | int]:
        try:
            sealed = json.loads(self._seal.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(self._seal, f"not readable as JSON ({error})") from error
        if not isinstance(sealed, dict) or sealed != {**self._counts(), "sha256": sealed.get("sha256")}:
            raise self._damaged(self._seal, f"holds {sealed}; expected {self._counts()} and sha256")
        return sealed

    def _damaged(self, file: Path, what: str) -> InputError:
        return InputError(
            f"{file}: {what}; delete this file, the parts after it and {self._seal.name} (or all of {self.path}), and "
            "run again: what is missing is computed anew"
        )


def _check_shapes(example: Example, answers: Sequence[np.ndarray]):
    found, expected = [np.shape(values) for values in answers], [(len(r.ids),) for r in example.responses]
    if found != expected:
        raise ValueError(f"row {example.row + 1}: log-probabilities of shapes {found}; its answers have {expected}")


def _checked(example: Example, answers: Sequence[np.ndarray]) -> list[np.ndarray]:
    _check_shapes(example, answers)
    arrays = [np.array(values, np.float32) for values in answers]  # copies: the caller may reuse its buffer
    for answer, values in enumerate(arrays):
        if not np.isfinite(values).all():
            token = int(np.argmin(np.isfinite(values)))
            raise InputError(
                f"row {example.row + 1}: the reference's log-probability of token {token + 1} of answer {answer + 1} "
                f"is {values[token]}; expected finite numbers: check the reference's weights, or compute in float32"
            )
    return arrays
