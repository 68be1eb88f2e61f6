"""What stands where nothing was run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rodimus_lab.report.heat_map import wrap_title


@dataclass(frozen=True)
class NotRun:
    """A figure of which there is no run yet: it says so, with the command that would make it and what that needs."""

    title: str
    command: str
    needs: str = ""
    size: tuple[float, float] = (7.5, 2.5)

    @property
    def note(self) -> str:
        return f"not run: {self.command}" + (f"; {self.needs}" if self.needs else "")

    def rows(self) -> list[tuple[Any, ...]]:
        """One row, which says "not run"."""
        return [("figure", "state", "command", "needs"), (self.title, "not run", self.command, self.needs)]

    def paint(self, canvas: Any) -> None:
        """Draw into a matplotlib figure or a part of one."""
        axes = canvas.add_subplot(title=wrap_title(self.title, self.size[0]), frame_on=False)
        say_not_run(axes, self.command, self.needs)


def say_not_run(axes: Any, command: str, needs: str = "", said: str = "not run") -> None:
    """Write it into empty axes, which lose their numbers."""
    axes.set(xticks=[], yticks=[])
    axes.minorticks_off()
    place: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center"}
    axes.text(0.5, 0.65, said, fontsize="xx-large", color="#666666", **place)
    axes.text(0.5, 0.45, command, fontsize="medium", family="monospace", **place)
    axes.text(0.5, 0.28, needs, fontsize="small", wrap=True, **place)
