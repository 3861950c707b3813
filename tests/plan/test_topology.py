from types import SimpleNamespace

import pytest

from qstar_jax.errors import InputError
from qstar_jax.plan import topology
from qstar_jax.plan.topology import (
    CHIPS,
    chip_count,
    chip_of,
    device_count,
    share_of_chip,
    slice_count,
    slices_of,
    topology_devices,
)
from qstar_jax.training.throughput import peak_flops


@pytest.mark.parametrize(
    "name",
    [
        *("v5e", "v5e:", "v5e:2xa", "v5e:0x2", "0xv5e:2x2", "2x:2x2", "2xh100:1x1x8"),
        *("a100:1x1x1", "a100-80gb:8", "h100:8", "h100:1x1x1x1", ""),
    ],
)
def test_unknown_topologies(name):
    with pytest.raises(InputError, match=r"unknown topology .*v5e:4x4.*h100:1x1x8"):
        topology_devices(name)


def test_chips_are_known_by_the_examples():
    assert all(chip_of(chip.example) is chip for chip in CHIPS.values())
    assert {name for name, chip in CHIPS.items() if chip.is_compiled_for} == {*"v4 v5e v5p v6e tpu7x h100".split()}


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_figures_of_data_sheets(chip):
    # A chip does 30 to 2,500 TFLOP/s, reads its memory in 5 to 100 ms, and its network is slower than its memory.
    assert 3e13 < chip.peak_flops < 2.5e15
    assert 0.005 < chip.memory_bytes / chip.memory_bandwidth < 0.1
    assert chip.network_bandwidth < chip.memory_bandwidth
    assert all(chip_of(topology) is chip for topology in slices_of(chip.name))


def test_gpus_that_can_only_be_estimated():
    assert device_count("a100-80gb:1x2x8") == 16
    with pytest.raises(InputError, match=r"'t4:1x1x4': programs cannot be compiled for this GPU, but `qstar plan` est"):
        topology_devices("t4:1x1x4")


def test_devices_share_a_chip():
    whole, half = share_of_chip("tpu7x:2x2x1", 4), share_of_chip("tpu7x:2x2x1", 8)
    for figure in ("memory_bytes", "memory_bandwidth", "network_bandwidth", "peak_flops"):
        assert getattr(half, figure) == getattr(whole, figure) / 2 == getattr(chip_of("tpu7x:2x2x1"), figure) / 2


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    monkeypatch.setattr(topology, "find_library", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match=r"jax-cuda12-plugin, nvidia-cuda-nvcc-cu12, nvidia-cudnn-cu12: .*plan-gpu"):
        topology_devices("h100:1x1x1")
    with pytest.raises(InputError, match=r"needs libtpu: pip install 'qstar_jax\[plan\]'"):
        topology_devices("v5e:2x2")


@pytest.mark.parametrize(("installed", "is_refused"), [("0.0.42.1", False), ("0.0.42", False), ("0.0.30", True)])
def test_a_libtpu_of_another_jax_is_refused(monkeypatch, installed, is_refused):
    monkeypatch.setattr(topology, "requires", lambda name: ["numpy>=2", 'libtpu==0.0.42.*; extra == "tpu"'])
    monkeypatch.setattr(topology, "version", {"libtpu": installed, "jax": "0.10.2"}.get)
    monkeypatch.setattr(topology, "find_spec", lambda name: True)
    monkeypatch.setattr(topology, "get_topology_desc", lambda *_, **__: SimpleNamespace(devices=["a TPU"]))
    if is_refused:
        with pytest.raises(InputError, match=r"libtpu 0.0.30 does not belong to jax 0.10.2, .*libtpu==0.0.42.\*: pip"):
            topology_devices("v5e:2x2")
    else:
        assert topology_devices("v5e:2x2") == ["a TPU"]


def test_gpus(devices_of):
    (device,) = devices_of("h100:1x1x1")
    assert device.platform == "gpu" and device.device_kind.startswith(CHIPS["h100"].kind)
    assert peak_flops([device]) == 989e12 == CHIPS["h100"].peak_flops
    assert [d.process_index for d in devices_of("h100:1x2x2")] == [0, 0, 1, 1]


def test_tpus(devices_of):
    devices = devices_of("v5e:4x4")
    assert len(devices) == 16 and peak_flops(devices) == 16 * 197e12 == 16 * CHIPS["v5e"].peak_flops
    assert all(d.device_kind.startswith(CHIPS["v5e"].kind) for d in devices) and device_count("v5e:4x4") == 16
    assert len(devices_of("v6e:1x1")) == 1  # a part of a host
    with pytest.raises(InputError, match=r"topology 'v5e:3x3': .*not divisible.* exists: v5e:4x4"):
        topology_devices("v5e:3x3")
    assert device_count("v4:2x2x1") == 4 and device_count("tpu7x:2x2x1") == 8


def test_slices_of_tpus(devices_of):
    devices = devices_of("2xv5e:2x2")
    assert [d.slice_index for d in devices] == [0] * 4 + [1] * 4
    assert slice_count("2xv5e:2x2") == 2 and chip_count("2xv5e:2x2") == device_count("2xv5e:2x2") == 8
    assert slice_count("2xtpu7x:2x2x1") == 2 and device_count("2xtpu7x:2x2x1") == 16


def test_between_hosts_of_gpus_the_network_is_slow():
    assert slice_count("h100:1x2x8") == 2


def test_slices_whose_network_is_unknown():
    with pytest.raises(InputError, match="topology '2xv4:2x2x4': no data sheet"):
        topology_devices("2xv4:2x2x4")
