"""Steps compiled for several slices of TPUs: what travels between them."""

import pytest

from qstar_jax.config import MeshOptions
from qstar_jax.sharding import make_mesh


@pytest.mark.parametrize("options", [MeshOptions(data=2, fsdp=-1), MeshOptions(data=4, fsdp=2, tensor=2)])
def test_data_extends_over_slices(devices_of, options):
    mesh = make_mesh(options, devices_of("2xv5e:2x4"))
    slices = [{device.slice_index for device in row.flat} for row in mesh.devices]
    assert slices == [{0}] * (options.data // 2) + [{1}] * (options.data // 2)


def test_an_axis_may_be_a_part_of_the_links_of_a_slice(devices_of):
    # Eight of 4 x 4 chips: two rows.
    mesh = make_mesh(MeshOptions(data=2, fsdp=8), devices_of("v6e:4x4"))
    assert mesh.devices.shape == (2, 8, 1)
    for row in mesh.devices:
        assert len({device.coords[0] for device in row.flat}) * len({device.coords[1] for device in row.flat}) == 8
