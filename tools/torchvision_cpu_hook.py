"""Makes a CUDA build of torchvision importable with a CPU build of torch. Only torchvision's Python parts work.

`tools/install.py` copies this file into the environment's site-packages, with a `.pth` file that calls `install()`
whenever Python starts. A vLLM plugin would be too late, because vLLM's model-inspection process imports torchvision
before any plugin is loaded.

The package index has only a CUDA build of torchvision, and its compiled extension does not load without CUDA. Without
the extension, `import torchvision` fails with "operator torchvision::nms does not exist", because torchvision's Python
code registers functions for two operators that only the extension declares. This file declares both operators just
before torchvision is first imported. The operators have no implementation, so a call raises an error. If the extension
loads, this file changes nothing. Tested in tests/tools/test_install.py.
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

# Operators that torchvision/_meta_registrations.py needs, with the schemas from torchvision's C++ code.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[object] = []  # Library objects, which must stay alive: if one is deleted, torch drops its operators


class PreparedLoader(importlib.machinery.SourceFileLoader):
    """Declares the missing operators, then runs torchvision's own __init__."""

    def exec_module(self, module: ModuleType) -> None:
        declare_missing_operators(self.path)
        super().exec_module(module)


class TorchvisionFinder:
    """Finds torchvision as usual, but loads it with PreparedLoader. The search itself imports nothing."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = PreparedLoader(spec.loader.name, spec.loader.path)
        return spec


def declare_missing_operators(package_file: str) -> None:
    """Declares the operators in SCHEMAS. Does nothing if torch has CUDA, or if torchvision's own extension loads.

    `package_file` is torchvision's `__init__.py`. The extension `_C` is in the same folder.
    """
    import torch  # imported only here, because this file runs whenever Python starts

    if torch.version.cuda is not None or _extension_loads(package_file):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    _declared.append(library)


def _extension_loads(package_file: str) -> bool:
    """Loads torchvision's extension. Returns True if this works. torchvision may later load the extension again, which
    has no effect."""
    import torch

    folder = package_file.rpartition("/")[0] or "."
    finder = importlib.machinery.FileFinder(
        folder, (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    )
    spec = finder.find_spec("_C")
    if spec is None or spec.origin is None:
        return False
    try:
        torch.ops.load_library(spec.origin)
    except (ImportError, OSError):
        return False
    return True


def install() -> None:
    """Puts TorchvisionFinder first on `sys.meta_path`, if it is not there yet."""
    if TorchvisionFinder not in sys.meta_path:
        sys.meta_path.insert(0, TorchvisionFinder)
