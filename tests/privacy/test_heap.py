# SPDX-License-Identifier: Apache-2.0
"""Freed memory stays with the process, unless the environment has its own settings."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")

FAULTS = """
import resource, sys
import torch
from wavedp.privacy.heap import keep_freed_memory
print(keep_freed_memory())
def step():
    held = [torch.ones(1 << 18) for _ in range(48)]  # 1 MiB each, freed from the last to the first
    while held:
        held.pop()
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def settings_and_faults(**environment: str) -> tuple[bool, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    found = subprocess.run(
        [sys.executable, "-c", FAULTS], env=clean | environment, check=True, capture_output=True, text=True
    )
    was_set, faults = found.stdout.split()
    return was_set == "True", int(faults)


def test_what_a_step_frees_is_not_faulted_in_again() -> None:
    pages = 48 << 20 >> 12
    was_set, faults = settings_and_faults()
    assert was_set
    assert faults < pages // 20


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")]
)
def test_settings_of_the_environment_stay(name: str, value: str) -> None:
    was_set, faults = settings_and_faults(**{name: value})
    assert not was_set
    assert faults > (48 << 20 >> 12) // 2
