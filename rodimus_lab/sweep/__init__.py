"""Many recipes: side by side over Ray, on this machine or a cluster, or one after another in this process."""

from rodimus_lab.sweep.engine import sweep
from rodimus_lab.sweep.outcome import Outcome, SweepOptions, failures

__all__ = ["Outcome", "SweepOptions", "failures", "sweep"]
