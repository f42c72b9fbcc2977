import subprocess
import sys

import pytest

from models.cpu.features import guard_onednn, has_bf16, isa_cap

CPUINFO = "processor\t: 0\ncpuid level\t: {level}\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\ncpuid level\t: 99\n"


@pytest.mark.parametrize(
    ("level", "flags", "cap"),
    [
        (28, "avx512_bf16 amx_tile avx512_fp16", "AVX512_CORE_FP16"),
        (28, "avx512_bf16 amx_tile", "AVX512_CORE_BF16"),
        (31, "avx512_bf16 amx_tile avx512_fp16", None),  # the palettes are described: AMX may run
        (13, "avx2", None),
    ],
)
def test_cap_follows_the_processor(level, flags, cap):
    assert isa_cap(CPUINFO.format(level=level, flags=flags)) == cap


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (CPUINFO.format(level=31, flags="avx512_bf16"), True),
        (CPUINFO.format(level=31, flags="avx512f avx512_vnni"), False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", True),  # Arm
        ("processor\t: 0\nmodel name\t: bf16\n", False),
        ("", False),
    ],
)
def test_bf16_instructions_are_read_off(text, found):
    assert has_bf16(text) is found


def test_no_cap_without_cpuinfo():
    assert isa_cap("") is None


def test_the_persons_own_setting_wins(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO.format(level=28, flags="amx_tile"))
    chosen, empty = {"ONEDNN_MAX_CPU_ISA": "AVX2"}, {}
    guard_onednn(chosen, path)
    guard_onednn(empty, path)
    assert chosen == {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert empty == {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}


def test_a_bf16_product_runs_after_the_import():
    code = "import models, torch; a = torch.ones(512, 512).bfloat16(); print((a @ a).float().mean().item())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == 512.0
