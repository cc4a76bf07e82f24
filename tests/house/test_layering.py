# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, read off the syntax trees: the arrows of CONTRIBUTING.md, and nothing else."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# layer: the layers it may import, lazily or not. Arrows point right and down; a layer may skip to anything
# further along, except past `ops`, which alone chooses between kernels, the native library and the reference.
#
#   cli -> {training, evaluation, audit, selftest, benchmarks}
#   evaluation (what synthetic images are worth) -> {training (checkpoints, pictures), data}
#   audit -> {training, models, privacy}
#   selftest (planted bugs and their detectors) -> privacy and what is below it
#   training -> {data, models, superres, privacy} -> functional -> ops -> {kernels, native, reference}
#   pipeline -> {models, superres}
#   compat (other libraries' names) -> functional
#   storage (files on disk) and extras (optional packages) stand beside the parts and import nothing of wavedp
#   errors (what is raised) is for everyone in wavedp/; kernels/ checks nothing
PARTS = {"data", "models", "superres", "privacy", "storage", "extras"}
ARROWS: dict[str, set[str]] = {
    "wavedp": {"functional", "ops", "pipeline", "compat", "optim"} | PARTS,  # the public face, wavedp/__init__.py
    "__main__": {"cli"},
    "cli": {"wavedp", "training", "pipeline", "functional", "benchmarks", "audit", "selftest", "evaluation"} | PARTS,
    "evaluation": {"training", "data", "storage", "weights_file"},
    # puts canaries through the private step of a run that training left
    "audit": {"training", "models", "privacy", "optim", "storage", "extras"},
    "selftest": {"functional", "optim", "private_step", "ops", "privacy", "storage"},
    # measures what lies under functional too, and training steps of the pipeline's models
    "benchmarks": {"wavedp", "functional", "optim", "ops", "reference", "kernels", "privacy", "models"},
    "training": {"wavedp", "pipeline", "functional", "optim"} | PARTS,
    "pipeline": {"models", "superres", "storage", "functional"},
    "data": {"storage", "extras", "functional"},
    "models": {"storage", "weights_file", "extras", "functional"},
    "superres": {"storage", "extras", "functional"},
    "privacy": {"storage", "extras", "functional", "optim", "ops"},
    "compat": {"functional"},
    "storage": {"weights_file"},
    "weights_file": set(),
    "extras": set(),
    "errors": set(),
    "functional": {"ops", "tokens", "per_sample", "noise"},
    "noise": {"ops", "noise_key", "noise_checks"},  # the noise functions of functional
    "noise_key": {"noise_checks"},
    "noise_checks": {"ops"},
    "optim": {"private_step", "noise_checks", "ops"},
    "private_step": {"noise_key", "noise_checks", "ops"},  # what the optimizers have in common
    "tokens": {"ops"},  # the token functions of functional
    "per_sample": {"ops"},  # and its functions on the gradients of single records
    "ops": {"kernels", "native", "reference"},
    "reference": set(),
    "kernels": set(),
}
NATIVE = {"_csrc", "_csrc_cuda"}

# Third-party packages at module level. Everything else is imported inside the function that uses it.
EAGER = {"torch", "numpy", "safetensors", "typing_extensions"}  # the last is a requirement of torch
EAGER_IN = {"kernels": {"torch", "numpy", "triton"}, "benchmarks": {"torch", "numpy", "pytest"}}
# Third-party packages that may be imported inside a function, and by which layers.
LAZY = {
    "triton": {"ops", "benchmarks"},
    "tomli": {"cli"},
    "tqdm": {"cli", "training", "data", "privacy", "superres", "models", "pipeline", "evaluation"},
    "dp_accounting": {"privacy"},
    "scipy": {"privacy", "data", "training", "audit"},
    "PIL": {"cli", "training", "data", "superres", "pipeline"},
    "matplotlib": {"cli", "training", "data", "benchmarks", "audit"},  # data: the fonts it ships
    "pywt": {"benchmarks"},
    "ptwt": {"benchmarks"},
    "pytorch_wavelets": {"benchmarks"},
    "opacus": {"benchmarks", "privacy"},  # privacy: its PRV accountant, for comparison
    "fastDP": {"benchmarks"},
    "sklearn": {"data", "training"},
    "HersheyFonts": {"data"},
    "datasets": {"data"},
    "diffusers": {"superres"},
    "transformers": {"superres", "models", "benchmarks"},  # T5 encoders; its GPT-2 beside our sampling
    "huggingface_hub": {"models"},  # the weights of a perceptual network
    "accelerate": {"superres"},
}


@dataclass(frozen=True)
class Import:
    module: str  # absolute dotted name
    line: int
    lazy: bool  # inside a function, or under `if TYPE_CHECKING:`


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Every import of a module that lives in `package`, with relative names made absolute."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(parents + ([base] if base else []))
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, lazy)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "import_extra")):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield Import(str(name.value), node.lineno, lazy)
        for child in ast.iter_child_nodes(node):
            body_of_if = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            runs_later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, lazy or body_of_if or runs_later)

    yield from walk(ast.parse(source), lazy=False)


def modules(root: Path) -> Iterator[tuple[Path, str, str]]:
    """(file, layer, package) of every Python module under wavedp/, kernels/ and benchmarks/."""
    for file in sorted((root / "wavedp").rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        package = ".".join(parts[:-1])
        layer = parts[1] if parts != ("wavedp", "__init__") else "wavedp"
        yield file, layer, package
    for file in sorted((root / "kernels").rglob("*.py")):
        yield file, "kernels", "wavedp.kernels"
    for file in sorted((root / "benchmarks").rglob("*.py")):
        yield file, "benchmarks", ".".join(("wavedp", *file.relative_to(root).parent.parts))


def layer_imported(name: str) -> str:
    """The layer that the absolute name `wavedp.x.y` or `wavedp.symbol` belongs to."""
    first = (*name.split("."), "")[1]
    if first in NATIVE:
        return "native"
    return first if first in ARROWS else "wavedp"


def violations(root: Path) -> list[str]:
    """One line for each import that no arrow allows."""
    found = []
    for file, layer, package in modules(root):
        where = file.relative_to(root)
        if layer not in ARROWS:
            found.append(f"{where}: layer {layer!r} has no place in the table of arrows")
            continue
        for item in imports_of(file.read_text(encoding="utf-8"), package):
            top = item.module.split(".")[0]
            at = f"{where}:{item.line}"
            if top == "wavedp":
                target = layer_imported(item.module)
                everywhere = set() if layer == "kernels" else {"errors"}
                if target not in ARROWS[layer] | {layer} | everywhere:
                    found.append(f"{at}: {layer} may not import {target} ({item.module})")
            elif top in sys.stdlib_module_names or top in EAGER_IN.get(layer, EAGER):
                continue
            elif top not in LAZY or layer not in LAZY[top]:
                found.append(f"{at}: {layer} may not import {top}")
            elif not item.lazy:
                found.append(f"{at}: {top} is imported at module level; import it where it is used")
    return found


def test_every_import_follows_an_arrow() -> None:
    found = violations(ROOT)
    assert not found, "\n".join(found)


def test_the_arrows_have_no_cycle() -> None:
    done: set[str] = {"native"}
    while ready := {layer for layer, targets in ARROWS.items() if targets <= done} - done:
        done |= ready
    assert done >= set(ARROWS)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("wavedp/ops/wavelet.py", "from wavedp import functional", "ops may not import functional"),
        ("wavedp/ops/wavelet.py", "from ..functional import dwt2", "ops may not import functional"),
        ("wavedp/ops/wavelet.py", "from . import x\nfrom .. import privacy", "ops may not import privacy"),
        ("wavedp/ops/wavelet.py", "import wavedp", "ops may not import wavedp"),
        ("wavedp/functional.py", "from wavedp import _csrc", "functional may not import native"),
        ("wavedp/functional.py", "import wavedp.kernels.wavelet", "functional may not import kernels"),
        ("wavedp/models/a.py", "def f():\n    from wavedp.data import x", "models may not import data"),
        ("wavedp/data/a.py", "import_module('wavedp.cli')", "data may not import cli"),
        ("wavedp/data/a.py", "import PIL.Image", "PIL is imported at module level"),
        ("wavedp/data/a.py", "try:\n    import sklearn\nexcept ImportError:\n    pass", "at module level"),
        ("wavedp/data/a.py", "import pandas", "data may not import pandas"),
        ("wavedp/data/a.py", "def f():\n    import_extra('pandas', 'demo')", "data may not import pandas"),
        ("wavedp/extras.py", "from wavedp import storage", "extras may not import storage"),
        ("wavedp/models/a.py", "def f():\n    import diffusers", "models may not import diffusers"),
        ("wavedp/reference/a.py", "from wavedp.ops import x", "reference may not import ops"),
        ("wavedp/extra/a.py", "", "has no place in the table"),
        ("kernels/a.py", "import wavedp.ops", "kernels may not import ops"),
        ("kernels/a.py", "from wavedp import errors", "kernels may not import errors"),
        ("kernels/a.py", "import safetensors", "kernels may not import safetensors"),
        ("benchmarks/cases/a.py", "from wavedp import training", "benchmarks may not import training"),
        ("benchmarks/a.py", "import ptwt", "ptwt is imported at module level"),
        ("wavedp/models/a.py", "import wavedp.benchmarks", "models may not import benchmarks"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    (found,) = violations(tmp_path)
    assert complaint in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("wavedp/ops/wavelet.py", "from wavedp import _csrc\nfrom wavedp.reference import wavelet"),
        ("wavedp/ops/wavelet.py", "def f():\n    from wavedp.kernels import wavelet"),
        ("wavedp/data/a.py", "def f():\n    import PIL.Image"),
        ("wavedp/data/a.py", "if TYPE_CHECKING:\n    from PIL import Image"),
        ("wavedp/__init__.py", "from wavedp.functional import dwt2"),
        ("kernels/a.py", "import torch\nimport triton.language as tl"),
        ("benchmarks/a.py", "from wavedp.ops import use_backend\ndef f():\n    import pywt"),
        ("wavedp/cli/bench.py", "from wavedp.benchmarks import run"),
    ],
)
def test_an_allowed_import_passes(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    assert violations(tmp_path) == []
