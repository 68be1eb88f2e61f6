"""Figures 2 and 3: what is drawn is what the code builds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.architecture import GROUPS, HEADS, NAMES, figure_2, figure_3
from rodimus_lab.nn.heads import HeadSharing
from rodimus_lab.nn.rodimus import Rodimus
from rodimus_lab.nn.zoo import model_config
from rodimus_lab.report import Diagram, PaperResults, write_figure


def parts(figure) -> dict[str, Diagram]:
    return {part.title.partition(":")[0]: part for part in figure.parts}


def test_figure_2_has_the_widths_of_the_modules() -> None:
    drawn = parts(figure_2([], PaperResults()))
    with torch.device("meta"):
        mixer = model_config("rodimus").pattern[0].sublayers[0].build(512)
    assert isinstance(mixer, Rodimus)
    inner, d = mixer.fc.weight.shape
    rows, m = mixer.state_proj.weight.shape
    assert inner == 2 * m
    details = {box.text: box.detail for box in drawn["Inside the Rodimus sublayer"].boxes}
    assert details["x, z"] == f"W_fc: {d} to 2 x {m:,}"
    assert details["q, k, g, tau"] == f"{m:,} to 4 x {rows // 4}"
    assert details["v = x beta_hat"] == f"rank {mixer.value_gate.down.weight.shape[0]}"
    assert details["x'"].startswith(f"conv {mixer.conv_weight.shape[1]},")
    assert details["S"] == "state {} x {:,}".format(*mixer.init_state(1).memory_B1nM.shape[2:])
    assert details["y"] == "W_out: {1:,} to {0}".format(*mixer.out_proj.weight.shape)


def test_figure_2_has_the_sublayers_in_order() -> None:
    drawn = parts(figure_2([], PaperResults()))
    assert drawn["rodimus"].title == "rodimus: 12 blocks of 1 hop"
    named = [(box.text, box.detail) for box in drawn["rodimus+"].boxes if box.sort == "sublayer"]
    assert named == [
        ("rodimus", "n = 64, m = 1,024"),
        ("windowed attention", "4 heads, 1 of keys, window 256"),
        ("swiglu feed-forward", "width 688"),
    ]


@pytest.mark.parametrize("kind", list(NAMES))
def test_figure_3_has_a_line_from_every_query_to_its_key_and_value(kind) -> None:
    heads = HeadSharing.of(kind, HEADS, GROUPS)
    drawn = parts(figure_3([], PaperResults()))[NAMES[kind]]
    count = {sort: sum(box.sort == sort for box in drawn.boxes) for sort in ("query", "key", "value")}
    assert tuple(count.values()) == (heads.num_heads, heads.num_key_heads, heads.num_value_heads)
    ends = [wire.points[1] for wire in drawn.wires]
    assert len(ends) == 2 * HEADS
    shares = {end: ends.count(end) for end in ends}
    assert sorted(shares.values()) == sorted(
        [HEADS // heads.num_key_heads] * heads.num_key_heads + [HEADS // heads.num_value_heads] * heads.num_value_heads
    )


@pytest.mark.parametrize("figure", [figure_2, figure_3])
def test_no_name_leaves_its_box_and_no_title_the_picture(figure) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure as Canvas

    made = figure([], PaperResults())
    canvas = Canvas(figsize=made.size, layout="constrained")
    made.paint(canvas)
    canvas.draw_without_rendering()
    for axes in canvas.axes:
        assert canvas.bbox.x0 <= axes.title.get_window_extent().x0
        assert axes.title.get_window_extent().x1 <= canvas.bbox.x1
        frames = [patch.get_window_extent() for patch in axes.patches]
        for text in axes.texts:
            extent = text.get_window_extent()
            middle = (extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2
            if text.get_text():
                assert any(
                    frame.contains(*middle) and frame.x0 <= extent.x0 and extent.x1 <= frame.x1 for frame in frames
                ), text


def test_they_are_the_same_files_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = figure_2([], PaperResults())
    first, again = (write_figure(made, tmp_path / name, "figure02") for name in ("first", "again"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert "drawn from the configs in the code, of no run" in made.note
