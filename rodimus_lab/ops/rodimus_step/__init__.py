from rodimus_lab.ops.rodimus_step.dispatch import rodimus_step
from rodimus_lab.ops.rodimus_step.weights import RodimusWeights

__all__ = ["RodimusWeights", "rodimus_step"]
