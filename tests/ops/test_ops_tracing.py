"""The marks do what `torch.compiler`'s own do, and a command loads neither Dynamo nor pandas for them."""

from __future__ import annotations

import subprocess
import sys

import torch

from rodimus_lab.ops.tracing import constant, opaque_operator, untraced


def test_a_constant_is_marked_as_torchs_own():
    def one() -> int:
        return 1

    def other() -> int:
        return 1

    assert vars(constant(one)) == vars(torch.compiler.assume_constant_result(other)) != {}


def test_what_is_untraced_runs_as_it_is_between_what_is_compiled():
    seen = []

    @untraced
    def plain(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return x.sin()

    graphs = []

    def backend(graph, inputs):
        graphs.append({node.name for node in graph.graph.nodes})
        return graph.forward

    x = torch.randn(3)
    y = torch.compile(lambda x: plain(x + 1) * 2, backend=backend)(x)
    torch.testing.assert_close(y, (x + 1).sin() * 2)
    assert seen == [False]
    assert len(graphs) == 2
    assert not any("sin" in name for graph in graphs for name in graph)


def test_an_opaque_operator_runs_without_autocast():
    @opaque_operator("test_of_autocast")
    def product(x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        assert y is not None
        return x @ y

    @product.register_fake
    def _(x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty(x.shape)

    x, y = torch.randn(3, 3), torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ y).dtype == torch.bfloat16
        for call in (product, torch.compile(product, fullgraph=True, backend="aot_eager")):
            torch.testing.assert_close(call(x, y), product(x, y), rtol=0, atol=0)
            assert call(x, y).dtype == torch.float32


def test_listing_the_commands_loads_neither():
    told = "import sys; from rodimus_lab.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    heavy = {"torch._dynamo", "torch.distributed.checkpoint", "pandas", "matplotlib", "transformers"}
    asked = f"print(*{heavy} & {{*sys.modules}})"
    command = [sys.executable, "-c", told + asked, "--help"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1] == ""
