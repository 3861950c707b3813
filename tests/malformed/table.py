"""All malformed inputs; a new one is an entry of its module."""

import tensors

import configs

CASES = [*configs.CASES, *tensors.CASES]
