"""mamba-ssm, which may be there without its CUDA build: its Triton kernels do not need it."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from rodimus_lab.ops.tracing import constant

CUDA_BUILD = "selective_scan_cuda"


class _Absent(ModuleType):
    """A module without contents, whose spec lets `find_spec` be asked again."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.util.spec_from_loader(name, loader=None)


@constant
def has_cuda_build() -> bool:
    return not isinstance(sys.modules.get(CUDA_BUILD), _Absent) and importlib.util.find_spec(CUDA_BUILD) is not None


def load_mamba_ssm() -> None:
    """Make `import mamba_ssm` work: it wants its CUDA build even where nothing of that is called."""
    if not has_cuda_build():
        sys.modules.setdefault(CUDA_BUILD, _Absent(CUDA_BUILD))
    import mamba_ssm  # noqa: F401
