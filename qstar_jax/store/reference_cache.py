"""Log-probabilities of a frozen reference on disk, so that later runs on the same data need not load its parameters.

A cache is the folder `<folder>/<key>/`. The key is a `fingerprint` of everything the numbers depend on, so a cache is
never stale: other data, another tokenizer or another reference map to another folder. It holds
`part-NNNNNN.safetensors`, each with the next `PART_EXAMPLES` examples, and, written last, `complete.json` with a digest
of all parts.

Files are written atomically, in order and only once. The boundaries between parts do not depend on batch sizes, so two
runs that fill a cache at the same time make the same files: the second to reach a part keeps the existing one. If both
check before either has written, both write the part; that is harmless if their numbers are identical, and otherwise (on
different devices) the digest detects it on reading.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qstar_jax.data.identity import digest_examples
from qstar_jax.data.tokenization import Example
from qstar_jax.errors import InputError
from qstar_jax.store.files import write_atomically, write_json

PART_EXAMPLES = 256  # examples per file, the most that an interrupted run has to recompute
_FORMAT = "qstar_jax reference cache 1"  # part of the key: a new file format gets new folders


def fingerprint(dataset_examples: Sequence[Example], ref_identity: str, dtype: str) -> str:
    """SHA-256 of everything that a reference's log-probabilities depend on.

    Row numbers and truncation flags are left out, since no log-probability depends on them.

    Args:
        dataset_examples: Prompts and responses as tokens, in order; they stand for data, tokenizer and truncation.
        ref_identity: `identity.weights_identity` of the reference: its parameters and its configuration (the base of
            its rotary positions, for instance, is not a parameter).
        dtype: Dtype of its activations, `compute.dtype`.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, ref_identity, dtype, len(dataset_examples)]).encode())
    digest_examples(digest, dataset_examples)
    return digest.hexdigest()


class ReferenceCache:
    """Log-probabilities of the responses of one dataset under one reference, in nats; see `open`.

    In a job of several processes, only the main process may call `write`, and the others must wait for it before they
    `read`; the caller takes care of both. All other methods only read from disk.

    Attributes:
        path: Folder of the cache, created by the first `write`.
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
        """Finds how much of a cache exists, and checks the parts that a run will continue from.

        Args:
            folder: Folder of all caches; need not exist.
            key: `fingerprint` of `examples` and the reference.
            examples: At least one, each with any number of responses.

        Returns:
            The cache; empty if there is none under this key.

        Raises:
            InputError: If a file is damaged, does not belong here, or follows a missing part.
        """
        cache = cls(Path(folder) / key, key, examples)
        cache._done = cache._scan()
        return cache

    @property
    def done(self) -> int:
        """Number of leading examples on disk, from which an interrupted run continues.

        The last part counts only together with `complete.json`, so a run that continues always completes the cache.
        """
        return self._done

    @property
    def complete(self) -> bool:
        """Whether all examples are on disk, whichever run wrote them."""
        return self._seal.is_file()

    def write(self, start: int, logps: Sequence[Sequence[np.ndarray]]):
        """Appends consecutive examples; they are written when a part is full, and with the last example.

        Args:
            start: Index of the first example: `done` at first, then where the last call ended.
            logps: For each example, for each response: log-probabilities of its tokens in nats, shape [T].

        Raises:
            InputError: If a number is not finite, or an existing part is damaged.
            ValueError: If `start` leaves a gap or overlaps, or shapes do not match the examples.
        """
        expected = self._done + len(self._pending)
        if start != expected or start + len(logps) > len(self._examples):
            raise ValueError(
                f"examples {start} to {start + len(logps)} written; expected to begin at {expected} and to end at "
                f"{len(self._examples)} at most"
            )
        examples = self._examples[start : start + len(logps)]
        self._pending += [_checked(example, responses) for example, responses in zip(examples, logps, strict=True)]
        # Write each part that is full; the last one may be smaller.
        while self._pending and len(self._pending) >= len(self._part_examples(self._done // PART_EXAMPLES)):
            number = self._done // PART_EXAMPLES
            size = len(self._part_examples(number))
            self._write_part(number, self._pending[:size])
            del self._pending[:size]
            self._done += size
            # Seal the cache after its last part.
            if self._done == len(self._examples):
                write_json(self._seal, self._summary())

    def read(self) -> list[list[np.ndarray]]:
        """Reads a complete cache, and verifies its digest.

        Returns:
            For each example, for each response: log-probabilities of its tokens in nats, float32 [T], read-only.

        Raises:
            InputError: If the cache is not complete, or a file is damaged.
        """
        if not self.complete:
            raise InputError(
                f"{self.path}: not complete ({self._done} of {len(self._examples)} examples); continue writing at "
                "`done`"
            )
        seal = self._read_seal()
        digest, logps = hashlib.sha256(), []
        for number in range(len(self._parts)):
            content, part = self._read_part(number)
            digest.update(content)
            logps += part
        if digest.hexdigest() != seal["sha256"]:
            raise self._damaged(self._seal, "its digest is not that of the parts")
        return logps

    def verify(self, sample: Sequence[int], logps: Sequence[Sequence[np.ndarray]], tolerance: float = 1e-3):
        """Compares newly computed log-probabilities with those on disk.

        Args:
            sample: Indices of a few examples, all below `done`.
            logps: For each of them, for each response: log-probabilities of its tokens in nats, shape [T].
            tolerance: Largest allowed difference, in nats per token. In bfloat16, a different batch size alone may
                exceed the default.

        Raises:
            InputError: If one differs by more; names the example that differs most.
            ValueError: If an example is not on disk, or shapes do not match the examples.
        """
        available = len(self._examples) if self.complete else self._done
        if not all(0 <= index < available for index in sample):
            raise ValueError(f"examples {list(sample)} to be compared; only {available} are on disk")
        # Find the largest difference; numbers that are not finite differ by infinity.
        parts = {number: self._read_part(number)[1] for number in sorted({index // PART_EXAMPLES for index in sample})}
        worst, row = 0.0, None
        for index, responses in zip(sample, logps, strict=True):
            example, cached = self._examples[index], parts[index // PART_EXAMPLES][index % PART_EXAMPLES]
            _check_shapes(example, responses)
            for new, old in zip(responses, cached, strict=True):
                gaps = np.nan_to_num(np.abs(np.asarray(new, np.float32) - old), nan=np.inf, posinf=np.inf)
                if gaps.max(initial=0.0) > worst:
                    worst, row = float(gaps.max()), example.row + 1
        if worst > tolerance:
            raise InputError(
                f"{self.path}: the cached log-probabilities of row {row} differ by up to {worst:.3g} nats per token "
                f"from those just computed (tolerance {tolerance:g}), so another model or program wrote them; delete "
                "this folder and run again"
            )

    def _scan(self) -> int:
        # Writers add files in order, perhaps during this scan. Looking for the last file first guarantees that all
        # files written before it are seen too.
        sealed = self.complete
        exists = [file.is_file() for file in reversed(self._parts)][::-1]
        for file in sorted(self.path.glob("part-*")):
            if file not in self._parts:
                raise self._damaged(file, f"not a part of this cache, which has {len(self._parts)}")
        # A sealed cache must have all its parts; `read` verifies their content.
        if sealed:
            self._read_seal()
            if not all(exists):
                raise self._damaged(self._parts[exists.index(False)], f"missing, though there is a {self._seal.name}")
            return len(self._examples)
        # An unsealed one must have no gap, and its parts must be intact.
        leading = (exists.index(False) if False in exists else len(exists)) if exists else 0
        if any(exists[leading:]):
            later = self._parts[exists.index(True, leading)]
            raise self._damaged(later, f"the part before it, {self._parts[leading].name}, is missing")
        for number in range(leading):
            self._read_part(number)
        return min(leading, len(self._parts) - 1) * PART_EXAMPLES

    def _part_examples(self, number: int) -> Sequence[Example]:
        return self._examples[number * PART_EXAMPLES : (number + 1) * PART_EXAMPLES]

    def _lengths(self, number: int) -> np.ndarray:
        return np.array([len(response.ids) for e in self._part_examples(number) for response in e.responses], np.int32)

    def _digest(self, number: int, lengths: np.ndarray, logps: np.ndarray) -> np.ndarray:
        """Detects a damaged or misplaced part before `complete.json` covers it."""
        digest = hashlib.sha256(f"{self.key} {number} ".encode())
        digest.update(lengths.astype("<i4"))
        digest.update(logps.astype("<f4"))
        return np.frombuffer(digest.digest(), np.uint8)

    def _write_part(self, number: int, examples: list[list[np.ndarray]]):
        from safetensors.numpy import save

        if self._parts[number].exists():  # another run has written it
            self._read_part(number)
            return
        lengths = self._lengths(number)
        logps = np.concatenate([np.zeros(0, np.float32), *(logp for responses in examples for logp in responses)])
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
        # Check the form, then the lengths, then the digest, so that the error names the most specific fault.
        actual = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
        expected = {
            "logps": ("float32", (int(lengths.sum()),)),
            "lengths": ("int32", lengths.shape),
            "sha256": ("uint8", (32,)),
        }
        if actual != expected:
            raise self._damaged(file, f"holds {actual}; expected {expected}")
        if not np.array_equal(arrays["lengths"], lengths):
            raise self._damaged(file, "the lengths of its responses differ from those of the data")
        if not np.array_equal(arrays["sha256"], self._digest(number, lengths, arrays["logps"])):
            raise self._damaged(file, "its digest does not match its numbers, or it belongs to another cache or part")
        # Split the flat array by responses.
        responses = iter(np.split(arrays["logps"], np.cumsum(lengths)))
        return content, [[next(responses) for _ in example.responses] for example in self._part_examples(number)]

    def _summary(self) -> dict[str, str | int]:
        """Returns the content of `complete.json`, digesting the bytes on disk, which another run may have written."""
        digest = hashlib.sha256()
        for number in range(len(self._parts)):
            digest.update(self._read_part(number)[0])
        return {**self._counts(), "sha256": digest.hexdigest()}

    def _counts(self) -> dict[str, str | int]:
        tokens = sum(len(response.ids) for example in self._examples for response in example.responses)
        return {"key": self.key, "examples": len(self._examples), "tokens": tokens}

    def _read_seal(self) -> dict[str, str | int]:
        try:
            seal = json.loads(self._seal.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(self._seal, f"not readable as JSON ({error})") from error
        if not isinstance(seal, dict) or seal != {**self._counts(), "sha256": seal.get("sha256")}:
            raise self._damaged(self._seal, f"holds {seal}; expected {self._counts()} and sha256")
        return seal

    def _damaged(self, file: Path, what: str) -> InputError:
        return InputError(
            f"{file}: {what}; delete this file, the parts after it and {self._seal.name} (or all of {self.path}), and "
            "run again: what is missing will be recomputed"
        )


def _check_shapes(example: Example, responses: Sequence[np.ndarray]):
    actual, expected = [np.shape(logp) for logp in responses], [(len(r.ids),) for r in example.responses]
    if actual != expected:
        raise ValueError(f"row {example.row + 1}: log-probabilities of shapes {actual}; its responses have {expected}")


def _checked(example: Example, responses: Sequence[np.ndarray]) -> list[np.ndarray]:
    _check_shapes(example, responses)
    arrays = [np.array(logp, np.float32) for logp in responses]  # copies: the caller may reuse its buffer
    for number, logp in enumerate(arrays, start=1):
        if not np.isfinite(logp).all():
            token = int(np.argmin(np.isfinite(logp)))
            raise InputError(
                f"row {example.row + 1}: the reference's log-probability of token {token + 1} of response {number} "
                f"is {logp[token]}; expected finite numbers: check the reference's weights, or compute in float32"
            )
    return arrays
