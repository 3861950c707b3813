"""Where the time of a traced program goes: the share of each kind of kernel, of idle time, and the longest kernels.

    python tests/accelerator/step_trace.py FOLDER

FOLDER is what `jax.profiler.trace` wrote. Prints JSON.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import auto_cli

# Kind of kernel -> what its name looks like; the first that fits counts. cuDNN serves attention only: there are no
# convolutions. Attention that XLA computes itself consists of products and fusions, and counts as those.
KINDS = {
    "attention": r"cudnn|fmha|sdpa|flash|attention",
    "collectives": r"nccl|all-?_?reduce|all-?_?gather|reduce-?_?scatter|all-?_?to-?_?all|collective",
    "matrix_products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|splitk|matmul|(^|[_-])dot([_.-]|$)|ynn_fusion",
    "copies_and_gathers": (
        r"memcpy|memset|copy|gather|scatter|transpose|dynamic-?_?update-?_?slice|dynamic-?_?slice|concatenate|"
        r"broadcast|(^|[_-])(pad|slice|reverse|iota)([_.-]|$)"
    ),
    "elementwise_and_reductions": (
        r"fusion|reduce|softmax|elementwise|convert|(^|[_-])(add|subtract|multiply|divide|maximum|minimum|negate|exp|"
        r"exponential|log|tanh|logistic|rsqrt|sqrt|power|select|compare|and|or|not|rng|threefry2x32)([_.-]|$)"
    ),
}
OTHER = "other"
CONTROL_FLOW = re.compile(r"(while|conditional|call)([.\d]*)$")  # spans of what runs inside them


@dataclass(frozen=True)
class Kernel:
    """A kernel, or on a CPU an operation, that ran once.

    Attributes:
        name: Its name.
        start_ns: When it began, in nanoseconds.
        duration_ns: How long it took, in nanoseconds.
        operation: Operation of the program that it belongs to, if known.
    """

    name: str
    start_ns: float
    duration_ns: float
    operation: str = ""

    @property
    def kind(self) -> str:
        """Kind of the kernel by its name, or else by its operation."""
        for text in (self.name, self.operation):
            for kind, pattern in KINDS.items():
                if re.search(pattern, text, re.IGNORECASE):
                    return kind
        return OTHER

    @property
    def short_name(self) -> str:
        """The name without the number that tells apart the operations of a program, and without long parameters."""
        return re.sub(r"([._]\d+)+$", "", self.name)[:100]


def read_kernels(folder: Path) -> list[Kernel]:
    """Reads the kernels in a trace: those of the accelerators, or the operations of the CPU where there are none."""
    from jax.profiler import ProfileData

    planes = [
        plane for file in sorted(folder.glob("**/*.xplane.pb")) for plane in ProfileData.from_file(str(file)).planes
    ]
    on_device = [plane for plane in planes if plane.name.startswith("/device:")]
    lines = [line for plane in on_device for line in plane.lines if line.name.startswith(("Stream", "XLA Ops"))]
    if lines:
        return [_kernel(event) for line in lines for event in line.events]
    events = (event for plane in planes for line in plane.lines for event in line.events)
    kernels = (_kernel(event) for event in events)
    return [kernel for kernel in kernels if kernel.operation and not CONTROL_FLOW.match(kernel.name)]


def _kernel(event) -> Kernel:
    return Kernel(event.name, event.start_ns, event.duration_ns, str(dict(event.stats).get("hlo_op", "")))


def busy_ns(kernels: Iterable[Kernel]) -> float:
    """Time in which at least one kernel ran."""
    busy, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start_ns):
        stop = kernel.start_ns + kernel.duration_ns
        busy += max(stop - max(kernel.start_ns, end), 0.0)
        end = max(end, stop)
    return busy


def summarize(kernels: list[Kernel], top: int = 10) -> dict:
    """Sums up the time of kernels.

    Args:
        kernels: At least one.
        top: Number of kernels to list.

    Returns:
        `span_seconds` from the first kernel to the end of the last; shares of the kinds and of idle time, which add up
        to 1 (kernels that run at once count twice); the kernels that take longest; and the names of kind `other`.

    Raises:
        ValueError: If there is no kernel.
    """
    if not kernels:
        raise ValueError("the trace holds no kernel")
    span = max(k.start_ns + k.duration_ns for k in kernels) - min(k.start_ns for k in kernels)
    idle = span - busy_ns(kernels)
    total = idle + sum(kernel.duration_ns for kernel in kernels)
    by_kind, by_name = defaultdict(float), defaultdict(list)
    for kernel in kernels:
        by_kind[kernel.kind] += kernel.duration_ns
        by_name[kernel.short_name, kernel.kind].append(kernel.duration_ns)
    longest = sorted(by_name, key=lambda key: -sum(by_name[key]))
    shares = {f"{kind}_share": by_kind[kind] / total for kind in (*KINDS, OTHER)}
    return {
        "span_seconds": span / 1e9,
        "kernels": len(kernels),
        **shares,
        "idle_share": idle / total,
        "longest": [
            {"kernel": name, "kind": kind, "share": sum(by_name[name, kind]) / total, "runs": len(by_name[name, kind])}
            for name, kind in longest[:top]
        ],
        "other": [name for name, kind in longest if kind == OTHER][:top],
    }


def main(folder: str):
    """Prints the summary of a trace.

    Args:
        folder: Folder of the trace.
    """
    print(json.dumps(summarize(read_kernels(Path(folder)))))


if __name__ == "__main__":
    auto_cli(main)
