"""The description of the machine that results carry."""

import json
import os
import socket
from dataclasses import asdict, replace

import pytest
import torch

from server.machine import describe_machine


def test_describes_processor_memory_and_versions() -> None:
    machine = describe_machine()
    assert machine.cpu
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert machine.memory_gib is None or machine.memory_gib > 0.1
    assert machine.packages["torch"] == torch.__version__


def test_does_not_name_the_host() -> None:
    document = json.dumps(asdict(describe_machine()))
    assert socket.gethostname() not in document
    assert "/" not in document


@pytest.mark.parametrize(
    ("cpu", "slug"),
    [
        ("AMD EPYC 9B45", "amd-epyc-9b45-4c"),
        ("AMD EPYC 7763 64-Core Processor", "amd-epyc-7763-4c"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c-4c"),
        ("Apple M3 Pro", "apple-m3-pro-4c"),
    ],
)
def test_slug_is_a_short_file_name(cpu: str, slug: str) -> None:
    assert replace(describe_machine(), cpu=cpu, cores=4).slug == slug
