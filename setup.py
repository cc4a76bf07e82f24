# SPDX-License-Identifier: Apache-2.0
"""Builds the native code in csrc/ with ninja; everything else about the package is in pyproject.toml.

wavedp._csrc needs a C++17 compiler (CXX, or the first of c++, g++, clang++), wavedp._csrc_cuda also nvcc
(of CUDA_HOME where that is set, else on PATH or in /usr/local/cuda). What cannot be built is left out with a
warning. Environment:

WAVEDP_BUILD_NATIVE  0 leaves both out; 1 makes failing to build _csrc an error
WAVEDP_BUILD_CUDA    0 leaves _csrc_cuda out; 1 makes failing to build it an error
WAVEDP_CXX_FLAGS     for compiling and linking _csrc, after the flags that it has, as in "-O1 -fsanitize=address"
WAVEDP_CUDA_ARCHS    compute capabilities, as in "80;90" (default: 80;90;100 as far as nvcc knows them)
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -ffp-contract=off -fno-trapping-math -fno-math-errno"
)
NVCC_FLAGS = "-std=c++17 -O3 --fmad=false -Xcompiler=-fPIC,-fvisibility=hidden"
ISA_FLAGS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS |= {"avx2": "-mavx2 -mfma", "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl"}
AMX_FLAGS = "-mamx-tile -mamx-bf16"
CUDA_ARCHS = ("80", "90", "100")
SHARED = "-pthread " + ("-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared")
CPU, CUDA = "wavedp._csrc", "wavedp._csrc_cuda"
BINDINGS = ["csrc/bindings.cpp", "csrc/bindings_noise.cpp", "csrc/bindings_per_sample.cpp"]
CUDA_BINDINGS = ["csrc/bindings_cuda.cpp", "csrc/bindings_cuda_noise.cpp"]
DISPATCH = ["csrc/cpu/dispatch.cpp", "csrc/cpu/dispatch_per_sample.cpp", "csrc/cpu/team.cpp"]
# Compiled for each instruction set. All implementations of the transforms give the same bits, so nothing may turn a
# product and a sum of theirs into one operation; norms are made of such operations.
KERNELS = {
    "csrc/cpu/noise.cpp": "",
    "csrc/cpu/noise_step.cpp": "",
    "csrc/cpu/wavelet.cpp": "",
    "csrc/cpu/wavelet_tokens.cpp": "",
    "csrc/cpu/per_sample_layers.cpp": "-ffp-contract=fast",
    "csrc/cpu/per_sample_linear.cpp": "-ffp-contract=fast",
}
AMX_KERNELS = ["csrc/cpu/amx_norms.cpp", "csrc/cpu/amx_weight_grad.cpp"]  # beside those of AVX-512, which do the rest
SOURCES = {
    CPU: [*BINDINGS, *DISPATCH, *KERNELS, *AMX_KERNELS],
    CUDA: [
        *CUDA_BINDINGS,
        "csrc/cuda/analysis.cu",
        "csrc/cuda/analysis_general.cu",
        "csrc/cuda/noise.cu",
        "csrc/cuda/noise_step.cu",
        "csrc/cuda/synthesis.cu",
    ],
}

RULES = """
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $linker $in -o $out
"""


def find_compiler() -> str:
    """The command of the C++ compiler, which may hold arguments."""
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    compiler = os.environ.get("CXX") or (shlex.quote(found) if found else None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: set CXX, or install c++, g++ or clang++")
    return compiler


def find_nvcc() -> str:
    """CUDA_HOME's nvcc where that is set, else the first of PATH and /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    found = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if found is None:
        raise FileNotFoundError(f"no nvcc in {home}/bin" if home else "no nvcc on PATH or in /usr/local/cuda")
    return found


def gencode(nvcc: str) -> str:
    """Machine code for every architecture, and PTX of the newest for those that come after it."""
    archs = os.environ.get("WAVEDP_CUDA_ARCHS", "").replace(";", " ").replace(".", "").split()
    if not archs:
        known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
        archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known.split()]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


def compile_step(output: str, rule: str, source: str, flags: str) -> str:
    path = str(ROOT / source)
    for character in "$ :":  # ninja's escapes in a path; the first is the escape itself
        path = path.replace(character, "$" + character)
    return f"build {output}: {rule} {path}\n  flags = {flags}\n"


def binding_flags() -> str:
    import pybind11

    include = [pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    return " ".join([CXX_FLAGS, *(f"-isystem {shlex.quote(path)}".replace("$", "$$") for path in include)])


def knows_amx(compiler: str) -> bool:
    """Whether the compiler has the tiles of AMX, and the system may give them to a process."""
    if "avx512" not in ISA_FLAGS or not sys.platform.startswith("linux"):
        return False
    probe = [*shlex.split(compiler), *AMX_FLAGS.split(), "-x", "c++", "-c", "-", "-o", os.devnull]
    program = 'void f() { asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }'
    return subprocess.run(probe, input=program, text=True, capture_output=True).returncode == 0


def cpu_rules() -> str:
    compiler, more = find_compiler(), os.environ.get("WAVEDP_CXX_FLAGS", "")
    amx = knows_amx(compiler)
    x86 = ("-DWAVEDP_X86" if "avx2" in ISA_FLAGS else "") + (" -DWAVEDP_AMX" if amx else "")
    steps = [f"cxx = {compiler}\nlinker = {compiler} {SHARED} {more}\n"]
    objects = []

    def compile_object(source: str, flags: str, suffix: str = "") -> None:
        objects.append(f"{Path(source).stem}{suffix}.o")
        steps.append(compile_step(objects[-1], "cxx", source, f"{flags} {more}"))

    for source in BINDINGS:
        compile_object(source, binding_flags())
    for source in DISPATCH:
        compile_object(source, f"{CXX_FLAGS} -pthread {x86}")
    for isa, flags in ISA_FLAGS.items():
        for source, extra in KERNELS.items():
            compile_object(source, f"{CXX_FLAGS} {extra} {flags} -DWAVEDP_ISA={isa}", f"-{isa}")
    for source in AMX_KERNELS if amx else []:
        compile_object(source, f"{CXX_FLAGS} {ISA_FLAGS['avx512']} {AMX_FLAGS} -DWAVEDP_ISA=amx")
    return "".join([*steps, f"build module.so: link {' '.join(objects)}\n"])


def cuda_rules() -> str:
    compiler, nvcc = find_compiler(), find_nvcc()
    host = f"-ccbin {compiler}" if len(shlex.split(compiler)) == 1 else ""
    linker = f"{shlex.quote(nvcc)} {host} -shared -cudart static -Xlinker=--exclude-libs,ALL"
    steps = [f"cxx = {compiler}\nnvcc = {shlex.quote(nvcc)}\nlinker = {linker}\n"]
    objects, flags = [], f"{NVCC_FLAGS} {host} {gencode(nvcc)}"
    for source in SOURCES[CUDA]:
        binding = source in CUDA_BINDINGS
        objects += [f"{Path(source).stem}.o"]
        steps += [
            compile_step(objects[-1], "cxx" if binding else "nvcc", source, binding_flags() if binding else flags)
        ]
    return "".join([*steps, f"build module.so: link {' '.join(objects)}\n"])


class NinjaBuild(build_ext):
    """Builds every extension in a ninja file of its own; one that fails is left out with a warning."""

    def build_extensions(self) -> None:
        built = []
        for extension in self.extensions:
            rules, variable = PARTS[extension.name]
            target = Path(self.get_ext_fullpath(extension.name))
            target.unlink(missing_ok=True)
            try:
                self.build_with_ninja(extension.name, rules(), target)
                built.append(extension)
            except (OSError, ImportError, subprocess.CalledProcessError) as error:
                if os.environ.get(variable) == "1":
                    raise
                warnings.warn(f"{extension.name} is left out, wavedp works without it: {error}", stacklevel=1)
        self.extensions = built

    def build_with_ninja(self, name: str, rules: str, target: Path) -> None:
        import ninja

        folder = Path(self.build_temp).resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(RULES + rules)
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(folder / "module.so"), str(target))


PARTS = {CPU: (cpu_rules, "WAVEDP_BUILD_NATIVE"), CUDA: (cuda_rules, "WAVEDP_BUILD_CUDA")}
left_out = {name for name, (_, variable) in PARTS.items() if os.environ.get(variable) == "0"}
names = [] if CPU in left_out else [name for name in PARTS if name not in left_out]

setup(
    ext_modules=[Extension(name, SOURCES[name], optional=True) for name in names],
    cmdclass={"build_ext": NinjaBuild},
)
