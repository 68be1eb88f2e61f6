"""Compiling Triton kernels for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def compile_for_hopper(
    kernel: Any, constants: Mapping[str, Any], type_of: Callable[[str], str], *, aligned: bool = False, **options: Any
) -> Any:
    """To machine code; the interpreter takes programs that the compiler refuses. `type_of` gives the type, such as
    "*bf16" or "i32", of an argument that is no constant; with `aligned` pointers are multiples of 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "constexpr" if name in constants else type_of(name) for name in kernel.arg_names}
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    pointers = [index for index, name in enumerate(kernel.arg_names) if types[name].startswith("*")]
    divisible = {(index,): [["tt.divisibility", 16]] for index in pointers} if aligned else None
    source = ASTSource(kernel, types, fixed, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4} | options)
    assert compiled.asm["cubin"]
    return compiled
