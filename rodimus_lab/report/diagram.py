"""Diagrams of boxes and wires: the hops of a model from its config, drawn by matplotlib as a part of a figure or by the
site's templates. Needs no torch.

Coordinates are pixels from the left upper corner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rodimus_lab.nn.model import LanguageModelConfig

PIXELS = 100  # an inch
# The filling of each sort of box.
FILLS = {"sublayer": "#D6E9F5", "query": "#D6E9F5", "key": "#FBE3C8", "value": "#CFEBDD"}
NORM_WIDTH, BOX_WIDTH, BOX_HEIGHT, SUM, GAP = 46, 148, 34, 18, 16
ROW, STREAM = 40, 108
Point = tuple[float, float]


class Box(NamedTuple):
    """A norm, a sublayer, a sum or another part, with its left upper corner; `detail` is a second, smaller line."""

    sort: str
    text: str
    x: float
    y: float
    width: float
    height: float
    detail: str = ""


class Wire(NamedTuple):
    """A line through points; where it ends in a part there is an arrow."""

    points: Sequence[Point]
    arrow: bool = True

    @property
    def path(self) -> str:
        """As SVG has it."""
        return "M" + "L".join(f"{x:g} {y:g}" for x, y in self.points)


@dataclass(frozen=True)
class Diagram:
    """Boxes and wires; `told` says the same in words."""

    title: str
    told: str
    boxes: Sequence[Box]
    wires: Sequence[Wire]
    width: float
    height: float

    @property
    def size(self) -> tuple[float, float]:
        """In inches, with room for the title."""
        return self.width / PIXELS, self.height / PIXELS + 0.4

    def rows(self) -> list[tuple[Any, ...]]:
        """The boxes in the order in which they were laid out, below their header."""
        return [("part", "name", "widths"), *((box.sort, box.text, box.detail) for box in self.boxes)]

    def paint(self, canvas: Any) -> None:
        """Draw into a matplotlib figure or a part of one."""
        from matplotlib.patches import FancyBboxPatch

        axes = canvas.add_subplot(title=self.title, xlim=(0, self.width), ylim=(self.height, 0), aspect="equal")
        axes.axis("off")
        for wire in self.wires:
            axes.plot(*zip(*wire.points, strict=True), color="#444444", linewidth=0.8, zorder=1)
            if wire.arrow:
                ends: dict[str, Any] = {"arrowstyle": "-|>", "color": "#444444", "linewidth": 0.8}
                axes.annotate("", *wire.points[:-3:-1], arrowprops=ends | {"shrinkA": 0, "shrinkB": 0}, zorder=1)
        for box in self.boxes:
            style = f"round,pad=0,rounding_size={box.height / 2 if box.sort == 'sum' else 5}"
            fill = FILLS.get(box.sort, "white")
            shape: dict[str, Any] = {"boxstyle": style, "facecolor": fill, "edgecolor": "#444444", "linewidth": 0.8}
            axes.add_patch(FancyBboxPatch(box[2:4], box.width, box.height, **shape))
            middle = box.x + box.width / 2
            split = 0.2 * box.height if box.detail else 0.0
            place: dict[str, Any] = {"ha": "center", "va": "center"}
            axes.text(middle, box.y + box.height / 2 - split, box.text, fontsize=8, **place)
            axes.text(middle, box.y + box.height / 2 + split, box.detail, fontsize=6.5, **place)


def diagrams_of(config: LanguageModelConfig, detail: Callable[[Any], str] = lambda sublayer: "") -> list[Diagram]:
    """The blocks of a model in order, equal neighbours as one picture; `detail` is what stands below a sublayer's
    name."""
    runs = [(block, len(list(same))) for block, same in groupby(config.pattern)]
    if len(runs) == 1:
        return [_diagram(runs[0][0].hops, runs[0][1] * config.repeats, "", detail)]
    again = f" of a pattern that stands {config.repeats} times" if config.repeats > 1 else ""
    return [
        _diagram(block.hops, count, f"Part {number} of {len(runs)}{again}: ", detail)
        for number, (block, count) in enumerate(runs, 1)
    ]


def _diagram(hops: Sequence[Sequence[Any]], count: int, which: str, detail: Callable[[Any], str]) -> Diagram:
    boxes: list[Box] = []
    wires: list[Wire] = []
    x: float = 24
    top = ROW - BOX_HEIGHT / 2
    for hop in hops:
        start = x
        wires.append(Wire([(start, STREAM), (start, ROW), (start + GAP, ROW)]))
        x += GAP
        taken = start  # where the stream that the next sum adds to was read
        for index, sublayer in enumerate(hop):
            boxes.append(Box("norm", "norm", x, top, NORM_WIDTH, BOX_HEIGHT))
            x += NORM_WIDTH
            wires.append(Wire([(x, ROW), (x + GAP, ROW)]))
            x += GAP
            boxes.append(Box("sublayer", _name(sublayer), x, top, BOX_WIDTH, BOX_HEIGHT, detail(sublayer)))
            x += BOX_WIDTH
            if index == len(hop) - 1:
                wires.append(Wire([(x, ROW), (x + GAP, ROW), (x + GAP, STREAM - SUM / 2)]))
                boxes.append(Box("sum", "+", x + GAP - SUM / 2, STREAM - SUM / 2, SUM, SUM))
                x += GAP + SUM
            else:
                wires.append(Wire([(x, ROW), (x + GAP, ROW)]))
                boxes.append(Box("sum", "+", x + GAP, ROW - SUM / 2, SUM, SUM))
                middle, below = x + GAP + SUM / 2, STREAM - 24
                from_stream = (taken, STREAM if not index else ROW)
                wires.append(Wire([from_stream, (taken, below), (middle, below), (middle, ROW + SUM / 2)]))
                x += GAP + SUM
                taken = x
                wires.append(Wire([(x, ROW), (x + GAP, ROW)]))
                x += GAP
        x += GAP
    wires.insert(0, Wire([(4, STREAM), (x + 8, STREAM)]))
    title = f"{which}{count} block{'s' if count > 1 else ''} of {len(hops)} hop{'s' if len(hops) > 1 else ''}"
    told = "; ".join(
        f"hop {number}: {', then '.join(f'norm and {_name(one)}' for one in hop)}, added to the residual stream"
        for number, hop in enumerate(hops, 1)
    )
    return Diagram(title, told, boxes, wires, x + 16, STREAM + 26)


def _name(sublayer: Any) -> str:
    """What a sublayer is, in a word or two."""
    if sublayer.kind == "attention":
        return "windowed attention" if sublayer.window else "attention"
    if sublayer.kind == "feed_forward":
        return str(getattr(sublayer, "activation", "feed-forward")) + " feed-forward"
    return str(sublayer.kind).replace("_", " ")
