"""Freed memory stays with the process, measured in page faults of a fresh process."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from app.memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else False
def fault_count():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    torch.ones(64 * 2**20, dtype=torch.uint8)
for _ in range(40):
    step()
before = fault_count()
for _ in range(5):
    step()
print(kept, fault_count() - before)
"""
PAGES = 5 * 64 * 2**20 // 4096


def faults(mode, **environment):
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", FAULTS, mode]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_second_step_touches_no_new_pages():
    kept, count = faults("keep")
    assert kept
    assert count < PAGES / 20
    assert faults("leave")[1] >= PAGES


def test_a_setting_of_the_person_wins():
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] is False
