"""The peers: other people's models, timed in the same run as ours, at the same shapes and by the same stopwatch.

Each stands behind two faces: `loss`, as our own model has it, so that the trainer's own step trains it, and `prefill`
with `step`, for decoding. It is built at a `Size`, named beside the model of ours that it must match in parameters, and
is given its best documented path: CUDA graphs, torch.compile, the Triton convolution.

Shapes: B batch, T time, V vocabulary, D channels, W taps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rodimus_lab.bench.measure import median_seconds
from rodimus_lab.bench.result import Row
from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.feedforward import FeedForwardConfig
from rodimus_lab.nn.model import IGNORE
from rodimus_lab.nn.rodimus import RodimusConfig
from rodimus_lab.nn.zoo import SIZES, Size, model_config
from rodimus_lab.ops.installed import installed
from rodimus_lab.ops.mamba_ssm import has_cuda_build, load_mamba_ssm
from rodimus_lab.registry import Registry

PARAMETER_TOLERANCE = 0.05
LOSS_TOLERANCE = 1.0  # nats from ln V: fresh weights of deviation 0.02 give up to half a nat more
DECODE_TOLERANCE = 0.1
DECODE_STEPS, DECODE_WARMUP = 64, 8
OUT_OF_MEMORY: Row = {"note": "out of memory", "out_of_memory": True}
CHECKED_PROMPT, CHECKED_STEPS = 32, 3


class Peer(nn.Module, ABC):
    """`package` is what has to be installed, `like` our model of the same size; `kernels` without a CPU path.

    `net` maps ids_BT to an output with `.logits` and has its head at `.lm_head`.
    """

    package: ClassVar[tuple[str, str]]  # module, how to install it
    like: ClassVar[str]
    kernels: ClassVar[bool] = True
    compilable: ClassVar[bool] = False
    decoding: ClassVar[str]
    net: Any

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """Why this peer cannot run on the device, or None."""
        module, how = cls.package
        if not installed(module):
            return f"{module} is not installed ({how})"
        return f"{module}'s kernels need a CUDA device" if cls.kernels and device.type != "cuda" else None

    @classmethod
    def training_flops_per_token(cls, size: Size, seq_len: int) -> float:
        """Forward and backward FLOPs a token, by the rule of our own models."""
        return model_config(cls.like, size=size).training_flops_per_token(seq_len)

    @property
    def head_weight_VD(self) -> Tensor:
        return self.net.lm_head.weight

    def logits(self, ids_BT: Tensor) -> Tensor:
        return self.net(ids_BT).logits

    def loss(self, ids_BT: Tensor, targets_BT: Tensor, *, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
        """Cross entropy in nats, the targets given apart from the inputs and not shifted."""
        logits_BTV = self.logits(ids_BT)
        return F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORE, reduction=reduction
        )

    def compile_loss(self) -> None:
        """Compile the whole of the loss as one."""
        self.loss = torch.compile(self.loss, dynamic=False)  # type: ignore[method-assign]

    @abstractmethod
    def prefill(self, ids_BT: Tensor, slots: int) -> Tensor:
        """Forget what was, read a prompt and return logits_BV of the next token; `slots` tokens are the most to come,
        prompt included."""

    @abstractmethod
    def step(self, ids_B1: Tensor) -> Tensor:
        """Read one more token and return logits_BV of the next."""


PEERS: Registry[type[Peer]] = Registry("peer")


@PEERS.register("fla-rodimus")
class FlaRodimus(Peer):
    """flash-linear-attention's Rodimus, eager, with its fused norms and fused cross entropy.

    Its default config fails, for its block reads `residual_in_fp32` where `block_residual_in_fp32` is meant: both are
    set.
    """

    package = ("fla", "pip install -e '.[kernels]'")
    like = "rodimus"
    decoding = "eager, its own recurrent cache"

    def __init__(self, size: Size):
        super().__init__()
        from fla.models import RodimusConfig as FlaConfig
        from fla.models import RodimusForCausalLM

        ours = model_config(self.like, size=size)
        mixer = _sublayer(ours.pattern[0], RodimusConfig)
        assert mixer.beta_hat is not None
        config = FlaConfig(
            block_type="rodimus",
            hidden_size=ours.d_model,
            num_hidden_layers=len(ours.blocks),
            expand_ratio=mixer.n,
            input_gate_low_rank=mixer.rank_of(mixer.beta_hat, ours.d_model),
            vocab_size=ours.vocab_size,
            residual_in_fp32=True,
            block_residual_in_fp32=True,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.net = RodimusForCausalLM(config)
        self._past: Any = None

    def loss(self, ids_BT: Tensor, targets_BT: Tensor, *, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
        from fla.modules import FusedCrossEntropyLoss

        logits_BTV = self.net(ids_BT, use_cache=False).logits
        criterion = FusedCrossEntropyLoss(ignore_index=IGNORE, reduction=reduction, inplace_backward=True)
        return criterion(logits_BTV.flatten(0, 1), targets_BT.flatten())

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor, slots: int) -> Tensor:
        self._past = None
        return self._read(ids_BT)

    @torch.no_grad()
    def step(self, ids_B1: Tensor) -> Tensor:
        return self._read(ids_B1)

    def _read(self, ids_BT: Tensor) -> Tensor:
        output = self.net(ids_BT, past_key_values=self._past, use_cache=True, logits_to_keep=1)
        self._past = output.past_key_values
        return output.logits[:, -1]


class MambaSsm(Peer):
    """A language model of mamba-ssm, of twice the layers of the size; decoding by its own CUDA graphs."""

    package = ("mamba_ssm", "pip install -e '.[gpu]' on a CUDA machine")
    decoding = "its own CUDA graphs"

    def __init__(self, size: Size):
        super().__init__()
        import_mamba_ssm()
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        config = MambaConfig(
            d_model=size.d_model, n_layer=2 * size.num_layers, vocab_size=size.vocab_size, ssm_cfg=self.layer()
        )
        self.net = MambaLMHeadModel(config)
        self._graphs: Any = None

    @staticmethod
    @abstractmethod
    def layer() -> dict[str, Any]:
        """Which layer of mamba-ssm, and its settings."""

    @torch.inference_mode()
    def prefill(self, ids_BT: Tensor, slots: int) -> Tensor:
        from mamba_ssm.utils.generation import update_graph_cache

        batch, length = ids_BT.shape
        self._graphs = update_graph_cache(self.net, self._graphs, batch, length, slots)
        memory = self._graphs.inference_params
        memory.reset(slots, batch)
        logits_BV = self.net(ids_BT, inference_params=memory, num_last_tokens=1).logits[:, -1]
        memory.seqlen_offset = length
        return logits_BV

    @torch.inference_mode()
    def step(self, ids_B1: Tensor) -> Tensor:
        memory = self._graphs.inference_params
        positions_B1 = torch.full_like(ids_B1, memory.seqlen_offset)
        logits_BV = self._graphs.run(ids_B1, positions_B1, memory.seqlen_offset)[:, -1]
        memory.seqlen_offset += 1
        return logits_BV


@PEERS.register("mamba-ssm-mamba2")
class MambaSsmMamba2(MambaSsm):
    """mamba-ssm's Mamba2 (state 128, heads of 64, chunks of 256) on its Triton SSD.

    Without its CUDA build it wants a module `selective_scan_cuda`, which Mamba2 never calls. Without causal-conv1d its
    fused path is closed, and flash-linear-attention's Triton convolution stands in where that is installed, torch's
    where not; in decoding, its own fallback for one step stays.
    """

    like = "mamba2"

    @staticmethod
    def layer() -> dict[str, Any]:
        return {"layer": "Mamba2", "use_mem_eff_path": installed("causal_conv1d")}


@PEERS.register("mamba-ssm-mamba")
class MambaSsmMamba(MambaSsm):
    """mamba-ssm's Mamba on its CUDA scan, convolution, gate and projections fused into one function."""

    like = "mamba"

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        reason = super().missing(device)
        if reason is None and not (has_cuda_build() and installed("causal_conv1d")):
            return f"mamba_ssm's CUDA build or causal_conv1d is not installed ({cls.package[1]})"
        return reason

    @staticmethod
    def layer() -> dict[str, Any]:
        return {"layer": "Mamba1"}


def import_mamba_ssm() -> None:
    """Make `import mamba_ssm` work without its CUDA build, and its convolution fast without causal-conv1d."""
    load_mamba_ssm()
    import mamba_ssm.modules.mamba2 as mamba2

    if mamba2.causal_conv1d_fn is None and installed("fla"):
        mamba2.causal_conv1d_fn = triton_convolution


def triton_convolution(
    x_BDT: Tensor, weight_DW: Tensor, bias: Tensor | None = None, activation: str | None = None, seq_idx: None = None
) -> Tensor:
    """causal-conv1d's function by flash-linear-attention's Triton kernels."""
    from fla.modules.causal_conv1d import causal_conv1d

    return causal_conv1d(x_BDT.transpose(1, 2), weight_DW, bias, activation=activation)[0].transpose(1, 2)


@PEERS.register("transformers-llama")
class TransformersLlama(Peer):
    """transformers' Llama in the shape of our Transformer++, compiled whole; decoding with a static cache and a step
    compiled into CUDA graphs, as its `generate` does.

    In training, attention is SDPA with `is_causal` and no mask: some versions build a mask under torch.compile, which
    costs the flash path.
    """

    package = ("transformers", "pip install -e '.[eval]'")
    like = "transformer++"
    kernels = False
    compilable = True
    decoding = "static cache, on CUDA torch.compile (reduce-overhead)"

    def __init__(self, size: Size):
        super().__init__()
        from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

        AttentionInterface.register("causal_sdpa", _causal_sdpa)
        ours = model_config(self.like, size=size)
        config = LlamaConfig(
            hidden_size=ours.d_model,
            num_hidden_layers=len(ours.blocks),
            num_attention_heads=size.num_heads,
            num_key_value_heads=size.num_heads,
            intermediate_size=_sublayer(ours.pattern[0], FeedForwardConfig).width,
            vocab_size=ours.vocab_size,
            max_position_embeddings=1 << 20,
            rms_norm_eps=ours.pattern[0].norm_eps,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.net = LlamaForCausalLM(config)
        self.net.set_attn_implementation("causal_sdpa")
        self._cache: Any = None
        self._call: Callable[..., Any] = self.net.__call__

    def logits(self, ids_BT: Tensor) -> Tensor:
        return self.net(ids_BT, use_cache=False).logits

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor, slots: int) -> Tensor:
        from transformers import StaticCache

        self.net.set_attn_implementation("sdpa")
        if self._cache is None:
            self._cache = StaticCache(config=self.net.config, max_cache_len=slots)
            if ids_BT.is_cuda:
                self._call = torch.compile(self.net.__call__, mode="reduce-overhead")
        self._cache.reset()
        return self.net(ids_BT, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    @torch.no_grad()
    def step(self, ids_B1: Tensor) -> Tensor:
        # The graph's output is overwritten by its next run.
        return self._call(ids_B1, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1].clone()


def _causal_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **settings: Any
) -> tuple[Tensor, None]:
    o = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=settings.get("scaling"))
    return o.transpose(1, 2), None


def _sublayer(block: BlockConfig, kind: type[Any]) -> Any:
    return next(sublayer for sublayer in block.sublayers if isinstance(sublayer, kind))


def build(name: str, size: Size, device: torch.device) -> Peer:
    """The peer with fresh weights on the device. Raises `ValueError` where its parameters are not those of its like."""
    peer_class = PEERS[name]
    torch.manual_seed(0)
    with torch.device(device):
        peer = peer_class(size)
    params, expected = parameters(peer), model_config(peer_class.like, size=size).num_params()
    if abs(params / expected - 1) > PARAMETER_TOLERANCE:
        raise ValueError(f"it has {params:,} parameters, {peer_class.like} has {expected:,}: no fair match")
    return peer


def parameters(model: nn.Module) -> int:
    """Learnable scalars, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def wrong_loss(first: float, vocab_size: int) -> str | None:
    """What is wrong with the loss of fresh weights on random tokens, which is about ln V; None where nothing is."""
    if math.isfinite(first) and abs(first - math.log(vocab_size)) <= LOSS_TOLERANCE:
        return None
    return f"the first loss is {first:.3f} where ln V is {math.log(vocab_size):.3f}, so it gets no time"


DecodePeer = Callable[[str, int, int, torch.device, torch.dtype], Row]
DECODE_PEERS: Registry[DecodePeer] = Registry("decode peer")


def decode(name: str, size: str, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> Row:
    """Seconds for one decoding step of a peer on `batch` sequences with `context` random tokens before it: the median
    of 64 steps.

    Before it is timed, steps after a short prompt are compared with the logits of the whole sequence at once; a peer
    whose decoding is off gets no time. A peer that cannot run gets a row whose `note` says why.
    """
    row: Row = {"model": name, "peer": True, "size": size, "batch_size": batch, "context": context}
    row |= {"dtype": str(dtype).removeprefix("torch."), "backend": PEERS[name].decoding}
    if reason := PEERS[name].missing(device):
        return row | {"note": f"cannot run: {reason}"}
    try:
        peer = build(name, SIZES[size]._replace(context=context), device).to(dtype).eval()
        return row | {"params": parameters(peer)} | _decode(peer, SIZES[size].vocab_size, batch, context, device)
    except torch.OutOfMemoryError:
        return row | OUT_OF_MEMORY
    except Exception as error:  # Whatever breaks in a peer must not cost the others their rows.
        return row | {"note": failure(error)}


def failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _decode(peer: Peer, vocab_size: int, batch: int, context: int, device: torch.device) -> Row:
    prompt = min(CHECKED_PROMPT, context)
    slots = max(context, prompt) + DECODE_WARMUP + DECODE_STEPS + CHECKED_STEPS + 1
    ids_BT = torch.randint(vocab_size, (batch, max(context, prompt + CHECKED_STEPS)), device=device)
    peer.prefill(ids_BT[:, :prompt], slots)
    for time in range(prompt, prompt + CHECKED_STEPS):
        logits_BV = peer.step(ids_BT[:, time : time + 1])
    with torch.no_grad():
        expected_BV = peer.logits(ids_BT[:, : prompt + CHECKED_STEPS])[:, -1].float()
    error = ((logits_BV.float() - expected_BV).norm() / expected_BV.norm()).item()
    if not error <= DECODE_TOLERANCE:  # NaN is no pass.
        return {
            "relative_error": error if math.isfinite(error) else None,
            "note": f"its decoding is off by {error:.1e} from its own parallel form; it gets no time",
        }
    token_B1 = peer.prefill(ids_BT[:, :context], slots).argmax(-1, keepdim=True)

    def one_step() -> None:
        nonlocal token_B1
        token_B1 = peer.step(token_B1).argmax(-1, keepdim=True)

    seconds = median_seconds(one_step, device, DECODE_STEPS, warmup=DECODE_WARMUP)
    return {
        "relative_error": error,
        "seconds_per_token": seconds,
        "tokens_per_second": batch / seconds,
        "weight_bytes": sum(p.numel() * p.element_size() for p in peer.parameters()),
    }


for _name in PEERS:
    DECODE_PEERS.register(_name)(partial(decode, _name))
