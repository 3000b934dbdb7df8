"""Cases that every implementation of the random bits is tried on."""

import pytest

# Random123, kat_vectors, philox4x32 with 10 rounds: counter, key, words.
PUBLISHED_VECTORS = [
    pytest.param(
        "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8", id="zeros"
    ),
    pytest.param(
        "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd", id="ones"
    ),
    pytest.param(
        "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1", id="pi"
    ),
]

# Sixteen draws that differ in one thing only, and must not be correlated.
UNCORRELATED_VARIANTS = [
    pytest.param([{"layer": layer} for layer in range(16)], id="layers"),
    pytest.param([{"first": 32 * index} for index in range(16)], id="positions"),
    pytest.param([{"sample": sample} for sample in range(16)], id="samples"),
    pytest.param([{"seed": seed} for seed in range(-8, 8)], id="seeds"),
]
