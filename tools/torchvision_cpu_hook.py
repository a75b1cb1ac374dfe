"""Lets a CUDA build of torchvision import beside a CPU build of torch, for its pure Python parts.

`tools/install.py` copies this file into the environment's site-packages with a `.pth` line that calls
`install()` at every interpreter start. A package of ours could not do it: vLLM's model-inspection process
imports torchvision before any plugin is loaded.

The package index only has a CUDA torchvision; its compiled extension does not load without CUDA, and then
`import torchvision` stops with "operator torchvision::nms does not exist", because it describes two
operators that only the extension declares. So they are declared here, just before torchvision is first
imported. They get no implementation: calling one raises, as it should. Where the extension loads, nothing
is touched.
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

# The operators that torchvision/_meta_registrations.py names, with the schemas of torchvision's C++.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[object] = []  # a torch library's declarations last only as long as the object


class PreparedLoader(importlib.machinery.SourceFileLoader):
    """Runs torchvision's own __init__ after making sure that the operators it describes exist."""

    def exec_module(self, module: ModuleType) -> None:
        declare_missing_operators(self.path)
        super().exec_module(module)


class TorchvisionFinder:
    """Finds torchvision where it would be found anyway; only its loader differs. Imports nothing itself."""

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
    """Declares SCHEMAS unless torch has CUDA or torchvision's own extension provides them.

    `package_file` is torchvision's `__init__.py`, which has the extension `_C` beside it.
    """
    import torch  # here and not above: this file is imported at every interpreter start

    if torch.version.cuda is not None or _extension_loads(package_file):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    _declared.append(library)


def _extension_loads(package_file: str) -> bool:
    """What torchvision tries a moment later in the same way; loading a library twice does nothing."""
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
    """Puts the finder first on `sys.meta_path`, once."""
    if TorchvisionFinder not in sys.meta_path:
        sys.meta_path.insert(0, TorchvisionFinder)
