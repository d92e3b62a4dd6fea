"""Builds the native library with CMake and Ninja and puts it into the package.

The library is plain C behind ctypes, so one wheel serves every Python and every torch.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("auxkern", "_native")


class BuildNative(build_ext):
    """cmake, ninja, and a copy of the library into the package (in place for editable installs)."""

    def run(self) -> None:
        if sys.platform == "win32":
            raise PlatformError(
                "auxkern has no build for Windows: its kernels take vector types of GCC and Clang and POSIX "
                "threads; install it in WSL, https://learn.microsoft.com/windows/wsl/install"
            )
        in_place = self.inplace or self.editable_mode
        # Setuptools would forget an editable install's objects, which `make test` takes over.
        build = ROOT / ("build/native" if in_place else self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        ninja = shutil.which("ninja")
        if ninja:
            # A build folder outlives the isolated environment whose ninja it remembers.
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(build), "--target", "auxkern"])
        folder = (ROOT if in_place else Path(self.build_lib).resolve()) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        for library in [*build.glob("libauxkern.so"), *build.glob("libauxkern.dylib")]:
            # Replaced by rename: a process that has the old library open keeps it.
            temporary = folder / f".{library.name}.new"
            shutil.copy2(library, temporary)
            os.replace(temporary, folder / library.name)

    def get_outputs(self) -> list[str]:
        if self.inplace or self.editable_mode:
            return []
        return [str(path) for path in (Path(self.build_lib) / PACKAGE).glob("libauxkern.*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the library depends on the platform, not on the interpreter."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    distclass=NativeDistribution,
)
