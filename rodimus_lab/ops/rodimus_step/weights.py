"""What a Rodimus sublayer's step reads.

Shapes: D model width, M inner width, n state expansion, R rank of the value gate, W convolution width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rodimus_lab.ops.linear_step import RMS


class RodimusWeights(NamedTuple):
    """`state_proj` gives q, k and the logits of g and tau, n rows each; E = 4 n."""

    norm: RMS
    fc_2MD: Tensor
    conv_MW: Tensor
    conv_bias_M: Tensor
    state_proj_EM: Tensor
    gate_bias_2n: Tensor
    gate_down_RM: Tensor
    gate_up_MR: Tensor
    gate_up_bias_M: Tensor
    feedthrough_M: Tensor
    out_norm: RMS
    out_DM: Tensor
