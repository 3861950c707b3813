"""All malformed inputs; a new one is an entry of its module."""

import adapters
import options
import outcomes
import rows
import templates
import tensors
import values

import configs

CASES = [
    *adapters.CASES,
    *configs.CASES,
    *tensors.CASES,
    *rows.CASES,
    *outcomes.CASES,
    *options.CASES,
    *templates.CASES,
    *values.CASES,
]
