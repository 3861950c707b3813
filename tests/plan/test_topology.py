import pytest

from qstar_jax.errors import InputError
from qstar_jax.plan import topology
from qstar_jax.plan.topology import CHIPS, chip_of, devices_per_chip, devices_per_slice, topology_devices
from qstar_jax.training.throughput import peak_flops


@pytest.mark.parametrize(
    "name",
    [
        "v5e",
        "v5e:",
        "v5e:2xa",
        "v5e:0x2",
        "0xv5e:2x2",
        "2x:2x2",
        "2xh100:1x1x8",
        "a100:1x1x1",
        "h100:8",
        "h100:1x1x1x1",
        "",
    ],
)
def test_unknown_topologies(name):
    with pytest.raises(InputError, match=r"unknown topology .*v5e:4x4.*h100:1x1x8"):
        topology_devices(name)


def test_chips_are_known_by_the_examples():
    assert all(chip_of(chip.example) is chip for chip in CHIPS.values())
    assert [name for name, chip in CHIPS.items() if chip.is_gpu] == ["h100"]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    monkeypatch.setattr(topology, "find_library", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match=r"jax-cuda12-plugin, nvidia-cuda-nvcc-cu12, nvidia-cudnn-cu12: .*plan-gpu"):
        topology_devices("h100:1x1x1")
    with pytest.raises(InputError, match=r"needs libtpu: pip install 'qstar_jax\[plan\]'"):
        topology_devices("v5e:2x2")


def test_gpus(devices_of):
    (device,) = devices_of("h100:1x1x1")
    assert device.platform == "gpu" and peak_flops([device]) == 989e12
    assert [d.process_index for d in devices_of("h100:1x2x2")] == [0, 0, 1, 1]


def test_tpus(devices_of):
    devices = devices_of("v5e:4x4")
    assert len(devices) == 16 and peak_flops(devices) == 16 * 197e12
    assert len(devices_of("v6e:1x1")) == 1  # a part of a host
    with pytest.raises(InputError, match=r"topology 'v5e:3x3': .*not divisible.* exists: v5e:4x4"):
        topology_devices("v5e:3x3")
    assert devices_per_chip("v4:2x2x1", devices_of("v4:2x2x1")) == 1
    assert devices_per_chip("tpu7x:2x2x1", devices_of("tpu7x:2x2x1")) == 2


def test_slices_of_tpus(devices_of):
    devices = devices_of("2xv5e:2x2")
    assert [d.slice_index for d in devices] == [0] * 4 + [1] * 4
    assert devices_per_slice("2xv5e:2x2", devices) == 4 and devices_per_chip("2xv5e:2x2", devices) == 1
    devices = devices_of("2xtpu7x:2x2x1")
    assert devices_per_slice("2xtpu7x:2x2x1", devices) == 8 and devices_per_chip("2xtpu7x:2x2x1", devices) == 2


def test_between_hosts_of_gpus_the_network_is_slow():
    assert devices_per_slice("h100:1x2x8", range(16)) == 8


def test_slices_whose_network_is_unknown():
    with pytest.raises(InputError, match="topology '2xv4:2x2x4': no data sheet"):
        topology_devices("2xv4:2x2x4")
