"""What is shipped: one version, a library that old systems load, and a source distribution that builds."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import auxkern

ROOT = Path(auxkern.__file__).parents[1]
LIBRARY = ROOT / "auxkern/_native/libauxkern.so"
GLIBC = (2, 28)  # that of manylinux_2_28: CentOS Stream 8, Debian 10, Ubuntu 18.10


@pytest.fixture(scope="module")
def symbols() -> list[str]:
    """The dynamic symbols of the native library, a line each."""
    if shutil.which("objdump") is None or not LIBRARY.exists():
        pytest.skip("needs objdump and a native library for Linux")
    printed = subprocess.run(["objdump", "-T", LIBRARY], capture_output=True, text=True, check=True).stdout
    return [line for line in printed.splitlines() if re.match(r"[0-9a-f]{8}", line)]


def test_the_library_loads_on_every_system_of_its_wheel(symbols: list[str]) -> None:
    """It needs the C library alone, and no younger version of a function than that of the wheel's tag."""
    needed = [line for line in symbols if "*UND*" in line]
    assert any("memcpy" in line for line in needed)
    versions = {
        (kind, version) for line in needed for kind, version in re.findall(r"\b([A-Z]+)_([0-9.]+)", line)
    }
    assert {kind for kind, _ in versions} == {"GLIBC"}, (
        "functions of the C++ run-time, see kernels/cpu/dispatch.h"
    )
    younger = {version for _, version in versions if tuple(map(int, version.split(".")[:2])) > GLIBC}
    assert not younger, "an entry in kernels/cpu/glibc.h is missing"


def test_the_library_shows_its_c_interface_and_nothing_else(symbols: list[str]) -> None:
    shown = {line.split()[-1] for line in symbols if "*UND*" not in line}
    declared = set(re.findall(r"\bauxkern_\w+(?=\()", (ROOT / "kernels/include/auxkern.h").read_text()))
    assert shown == declared


def test_the_changelog_and_the_citation_have_the_package_s_version() -> None:
    released = re.findall(
        r"^## (\d\S*) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    citation = (ROOT / "CITATION.cff").read_text()
    version, date = released[0]
    assert version == auxkern.__version__
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation


def test_a_source_distribution_has_what_the_build_reads_and_nothing_built(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("auxkern", "kernels", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    (copy / "auxkern/_native/libauxkern.so").write_bytes(b"of another machine")
    code = "import setuptools.build_meta as build; print(build.build_sdist('.'))"
    made = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=True)
    with tarfile.open(copy / made.stdout.splitlines()[-1]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    read = [
        path for folder in ("auxkern", "kernels") for path in (ROOT / folder).rglob("*") if path.is_file()
    ]
    wanted = {str(path.relative_to(ROOT)) for path in read if path.suffix not in (".pyc", ".so", ".dylib")}
    assert wanted | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= packed
    assert not [
        name for name in packed if name.startswith("tests") or name.endswith((".so", ".dylib", ".pyc"))
    ]


def test_windows_is_refused_with_the_way_out() -> None:
    code = (
        "import runpy, sys, setuptools.command.build_ext, setuptools.command.bdist_wheel\n"
        "sys.platform, sys.argv = 'win32', ['setup.py', 'build_ext']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no build for Windows" in done.stderr
    assert "install it in WSL" in done.stderr


def test_commands_of_the_core_need_torch_alone() -> None:
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['safetensors'] = None\n"
        "from auxkern.terminal import command_parser\n"
        "command_parser('prog', 'About.', '').parse_args([])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
