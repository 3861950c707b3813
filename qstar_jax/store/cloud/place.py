"""An address, and what is there."""

import re
from dataclasses import dataclass
from typing import Any

from qstar_jax.errors import InputError

_VERSION = ("etag", "ETag", "generation", "mtime", "LastModified", "last_modified", "modified")


@dataclass(frozen=True)
class Place:
    """Something that an option names by its address.

    Attributes:
        option: Dotted name of the option.
        address: Its value.
        files: The file system (fsspec).
        root: The address without its scheme: bucket/folder.
    """

    option: str
    address: str
    files: Any
    root: str

    @classmethod
    def at(cls, option: str, address: str) -> "Place":
        """Opens the file system of an address.

        Raises:
            InputError: If it cannot be opened.
        """
        import fsspec

        scheme, separator, _ = address.partition("://")
        if not separator or scheme in ("file", "local"):
            raise InputError(f"--{option} {address}: expected a path, or an address such as gs://bucket/folder")
        try:
            files, root = fsspec.url_to_fs(address, skip_instance_cache=True)
        except ImportError as error:
            raise InputError(
                f"--{option} {address}: {scheme}:// needs a package ({error}); for gs:// and s3://: "
                "pip install 'qstar_jax[cloud]'"
            ) from error
        except Exception as error:  # each file system has types of its own
            raise InputError(f"--{option} {address}: not opened ({reason(error)})") from error
        return cls(option, address, files, root.rstrip("/"))

    def __str__(self) -> str:
        """As in messages."""
        return f"--{self.option} {self.address}"

    @property
    def scheme(self) -> str:
        """The part of the address before ://."""
        return self.address.partition("://")[0]

    @property
    def is_pattern(self) -> bool:
        """Whether it names several files, such as data/*.jsonl."""
        return bool(re.search(r"[*?\[]", self.root)) and not self.scheme.startswith("http")

    def listing(self, root: str) -> dict[str, str | None]:
        """Lists files below a root: their names, relative to it ("" is the root itself), and what tells versions apart.

        Raises:
            InputError: If that is not possible.
        """
        try:
            self.files.invalidate_cache()
            if self.is_pattern:
                found = self.files.glob(self.root, detail=True)
            elif self.files.isfile(root):
                return {"": version_of(self.files.info(root))}
            else:
                found = self.files.find(root, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise InputError(f"{self}: not listed ({reason(error)})") from error
        names = {path[len(root) + 1 :]: version_of(info) for path, info in found.items() if info["type"] == "file"}
        if unsafe := [name for name in names if ".." in name.split("/") or name.startswith("/")]:
            raise InputError(f"{self}: holds a file of the name {unsafe[0]!r}, which would lie outside of its copy")
        return names

    def has_file(self, path: str) -> bool:
        """Whether there is a file; what is wrong with an address is said where it is listed."""
        try:
            return self.files.isfile(path)
        except Exception:
            return False

    def check_bucket(self):
        """Refuses a bucket that is not there, or not ours.

        Raises:
            InputError: If it is one.
        """
        bucket = self.root.partition("/")[0]
        if self.scheme not in ("gs", "gcs", "s3", "s3a"):
            return
        try:
            self.files.info(bucket)
        except FileNotFoundError as error:
            raise InputError(f"{self}: there is no bucket {bucket}") from error
        except Exception as error:
            raise InputError(f"{self}: the bucket {bucket} is not opened ({reason(error)})") from error


def version_of(info: dict[str, Any]) -> str | None:
    """What tells the versions of a file apart; None where the file system does not say."""
    known = [str(info[key]) for key in _VERSION if info.get(key)]
    return " ".join([*known, str(info.get("size"))]) if known else None


def reason(error: BaseException) -> str:
    """An error of a file system in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
