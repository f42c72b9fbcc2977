"""Freed memory stays with the process, measured in page faults of a fresh process."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from app.memory import ANY_SIZE, MATRICES_APART, keep_freed_memory

kept = {"keep": ANY_SIZE, "matrices apart": MATRICES_APART}.get(sys.argv[1])
kept = kept is not None and keep_freed_memory(kept)
def fault_count():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    torch.ones(int(sys.argv[2]), dtype=torch.uint8)
for _ in range(40):
    step()
before = fault_count()
for _ in range(5):
    step()
print(kept, fault_count() - before)
"""
LARGE, SMALL = 64 * 2**20, 8 * 2**20  # bytes
PAGES = 5 * LARGE // 4096


def faults(mode, size=LARGE, **environment):
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", FAULTS, mode, str(size)]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_second_step_touches_no_new_pages():
    kept, count = faults("keep")
    assert kept
    assert count < PAGES / 20
    assert faults("leave")[1] >= PAGES


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_large_matrices_can_go_back_while_the_rest_stays():
    assert faults("matrices apart")[1] >= PAGES
    assert faults("matrices apart", SMALL)[1] < 5 * SMALL // 4096 / 20


def test_a_setting_of_the_person_wins():
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] is False
