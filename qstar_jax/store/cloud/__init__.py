"""Files and folders elsewhere (gs://, s3://, and what else fsspec opens): copied here, and from here.

What is read is copied into the user's cache, where what has not changed stays. What is written is a folder of this
machine, whose finished files go to its address every few seconds and at the end. So nothing else of the library
knows about addresses, and a slow network holds up no step.

A checkpoint counts where its list of checksums is, which is copied last: what a process that was killed has left is
neither read nor resumed from.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from qstar_jax.config.paths import WRITTEN, replace_addresses
from qstar_jax.errors import InputError
from qstar_jax.store.cloud.place import Place
from qstar_jax.store.cloud.reading import copy
from qstar_jax.store.cloud.writing import CloudError as CloudError
from qstar_jax.store.cloud.writing import Mirror


@contextmanager
def at_hand(options: Any) -> Iterator[Any]:
    """Replaces the addresses among options by paths of this machine, and brings what is written to its address.

    Raises:
        InputError: If an address cannot be opened.
        CloudError: If what was written cannot be brought to its address at the end.
    """
    with ExitStack() as stack:

        def local(name: str, address: str) -> str:
            place = Place.at(name, address)
            if name not in WRITTEN:
                return str(copy(place))
            if getattr(getattr(options, "mesh", None), "multi_process", False):
                raise InputError(
                    f"{place}: with mesh.multi_process, processes write one folder together; mount the bucket on all "
                    "hosts and give that path"
                )
            return str(stack.enter_context(Mirror(place, is_shared=name.endswith("cache"))))

        yield replace_addresses(options, local)
