"""lm-eval's language model over this project's own: log-likelihoods, whole texts, and generation.

Requests are batched with others of exactly the same length, so that nothing is ever padded and a score does not depend
on the batch size.

Shapes: B batch, T time, V vocabulary, N the scored tokens at the end.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor
from tqdm import tqdm

from rodimus_lab.convert import CHAT_TEMPLATE, Chat, ChatTokenizer, Checkpoint, open_checkpoint
from rodimus_lab.data import Tokenizer
from rodimus_lab.decoder import Decoder
from rodimus_lab.device import device_type
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import IGNORE, LanguageModel
from rodimus_lab.sampling import Sampling
from rodimus_lab.scoring import scoring

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH_SIZE = 32
MAX_LENGTH = 2048
MAX_NEW_TOKENS = 256
MOST_LOGITS = 2**28  # 1 GiB of float32
ROLES = {"user": "HUMAN", "assistant": "ASSISTANT"}
ARGUMENTS = ("pretrained", "dtype", "max_length", "batch_size", "max_batch_size", "device")
GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class Generation(NamedTuple):
    """What `generate_until` was asked for, beside the prompt."""

    max_new_tokens: int
    until: tuple[str, ...]
    sampling: Sampling


@register_model("rodimus-lab")
class RodimusLabLM(TemplateLM):
    """A model of this project as lm-eval asks for it.

    `pretrained` is a run id, a checkpoint directory or what was read of one, or a model, which needs its `tokenizer`.
    `dtype` is that of the weights. A request of more than `max_length` tokens loses its first ones; it is by default
    2,048, or the number of learned positions where the model has them. Raises `UserError`.
    """

    def __init__(
        self,
        pretrained: str | Path | Checkpoint | LanguageModel,
        tokenizer: Tokenizer | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        max_length: int | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if dtype not in DTYPES:
            raise UserError(f"{dtype!r} is not a dtype that models are evaluated in; choose {' or '.join(DTYPES)}")
        self.name = "the model"
        if isinstance(pretrained, LanguageModel):
            if tokenizer is None:
                raise UserError("a model without a run needs its tokenizer; give one")
            model = pretrained
        else:
            kind = device_type(None if device is None else device.partition(":")[0])
            checkpoint = pretrained if isinstance(pretrained, Checkpoint) else open_checkpoint(pretrained)
            self.name = str(checkpoint.directory)
            tokenizer = tokenizer or checkpoint.tokenizer()
            model = checkpoint.build(device=device or kind, dtype=DTYPES[dtype])
        self.model = model.to(DTYPES[dtype]).eval()
        self.vocabulary = tokenizer
        self.batch_size = _batch_size(batch_size, max_batch_size)
        self.max_length = int(max_length or model.config.max_positions or MAX_LENGTH)
        self._device = model.embedding.weight.device
        self._decoder: tuple[Hashable, Decoder] | None = None
        self._chat: ChatTokenizer | None = None

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> RodimusLabLM:
        """See `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> RodimusLabLM:
        """From lm-eval's `--model_args`, before which its own options for batch size and device give way.

        lm-eval names a GPU wherever it was told of no device, so where there is none its option means the CPU, as for
        its own models, and a line says so. Raises `UserError` for an argument that is unknown or missing.
        """
        python_only = {"tokenizer"} if isinstance(arg_dict.get("tokenizer"), Tokenizer) else set()
        if unknown := sorted(set(arg_dict) - set(ARGUMENTS) - python_only):
            raise UserError(f"model_args of rodimus-lab has no {', '.join(unknown)}; it has {', '.join(ARGUMENTS)}")
        if "pretrained" not in arg_dict:
            raise UserError("model_args names no model; give pretrained=RUN_OR_DIRECTORY")
        given = {name: value for name, value in (additional_config or {}).items() if value is not None} | {**arg_dict}
        cuda = str(given.get("device")).partition(":")[0] == "cuda"
        if cuda and "device" not in arg_dict and not torch.cuda.is_available():
            print("no CUDA device is visible: the model runs on the CPU", file=sys.stderr)
            given["device"] = "cpu"
        return cls(**given)

    @property
    def eot_token_id(self) -> int:
        return self.vocabulary.eos_id

    @property
    def tokenizer_name(self) -> str:
        return self.vocabulary.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; no special token is added, whatever is asked for."""
        return (self._chat or self.vocabulary).encode(string)

    def tok_decode(self, tokens: Sequence[int], **_: Any) -> str:
        return self.vocabulary.decode(tokens)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The authors' chat format, which from here on is what prompts are read in: special tokens are spelled out."""
        self._chat = ChatTokenizer(self.vocabulary)
        return CHAT_TEMPLATE

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A prompt of messages by `system`, `user` and `assistant`; without `add_generation_prompt` the last message
        is the beginning of the answer. Raises `UserError` for another role."""
        system = "".join(message["content"] for message in chat_history if message["role"] == "system")
        turns = [message for message in chat_history if message["role"] != "system"]
        prefix = "" if add_generation_prompt else turns.pop()["content"]
        spoken = [
            {"role": ROLES.get(message["role"], message["role"]), "content": message["content"]} for message in turns
        ]
        return Chat(spoken, system or None).prompt + prefix

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each (_, context, continuation): log p of the continuation in nats, and whether it is the greedy one."""
        start = [self.prefix_token_id]  # Where a context is nothing but white space, which goes to the continuation.
        whole = [((context or start) + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        longest = max((len(continuation) for *_, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(f"a continuation of {longest} tokens does not fit max_length {self.max_length}")
        rows = max(1, min(self.batch_size, MOST_LOGITS // (max(longest, 1) * self.model.config.vocab_size)))
        scored = [index for index, (*_, continuation) in enumerate(requests) if continuation]
        with tqdm(total=len(scored), desc="log-likelihoods", disable=disable_tqdm) as bar, scoring(self.model):
            for batch in _batches(scored, [len(ids) for ids in whole], rows):
                counts = [len(requests[index][2]) for index in batch]
                ids_BT = torch.tensor([whole[index] for index in batch], device=self.device)
                answers = _endings(self.model, ids_BT, counts)
                for index, answer in zip(batch, answers, strict=True):
                    results[index] = self._finite(answer[0]), answer[1]
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                bar.update(len(batch))
        return results

    def _finite(self, nats: float) -> float:
        """The log-likelihood itself. Raises `UserError` naming the model where it is not finite."""
        if not math.isfinite(nats):
            raise UserError(f"{self.name} gives log-likelihoods that are not finite; give weights that did not diverge")
        return nats

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p in nats of each whole text after an end-of-document token, in windows of `max_length` tokens."""
        windows: list[tuple[int, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(number, *make_disjoint_window(pair)) for pair in pairs]
        totals = [0.0] * len(requests)
        whole = [context + predicted for _, context, predicted in windows]
        with tqdm(total=len(windows), desc="texts", disable=disable_tqdm) as bar, scoring(self.model):
            for batch in _batches(range(len(windows)), [len(ids) for ids in whole], self.batch_size):
                ids_BT = torch.tensor([whole[index] for index in batch], device=self.device)
                targets_BT = ids_BT[:, 1:].clone()
                for row, index in enumerate(batch):
                    targets_BT[row, : -len(windows[index][2])] = IGNORE
                nats_B = self.model.loss(ids_BT[:, :-1], targets_BT, reduction="none").double().sum(1)
                for index, nats in zip(batch, nats_B.tolist(), strict=True):
                    totals[windows[index][0]] -= self._finite(nats)
                bar.update(len(batch))
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What each prompt goes on with, up to one of its stops, which is left out, or an end-of-document token."""
        asked = [_generation(request.args[1]) for request in requests]
        prompts = []
        for request, how in zip(requests, asked, strict=True):
            room = self.max_length - how.max_new_tokens
            if room < 1:
                raise UserError(f"{how.max_new_tokens} new tokens leave no room in max_length {self.max_length}")
            prompts.append((self.tok_encode(request.args[0]) or [self.prefix_token_id])[-room:])
        texts = [""] * len(requests)
        keys = [(len(prompt), how) for prompt, how in zip(prompts, asked, strict=True)]
        with tqdm(total=len(requests), desc="generation", disable=disable_tqdm) as bar, scoring(self.model):
            for batch in _batches(range(len(requests)), keys, self.batch_size):
                how = asked[batch[0]]
                for index, text in zip(batch, self._continue([prompts[i] for i in batch], how), strict=True):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                bar.update(len(batch))
        return texts

    def _continue(self, prompts: list[list[int]], how: Generation) -> list[str]:
        """The continuations of prompts of one length."""
        # On CUDA making a decoder captures a graph, so all batches have one of the full number of rows.
        rows = self.batch_size if self.device.type == "cuda" else len(prompts)
        key = (rows, how.sampling)
        if self._decoder is None or self._decoder[0] != key:
            stop = (self.eot_token_id,)
            self._decoder = key, Decoder(self.model, rows, self.max_length, how.sampling, stop=stop)
        decoder = self._decoder[1]
        decoder.prefill(prompts + prompts[:1] * (rows - len(prompts)))
        drawn: list[list[int]] = [[] for _ in prompts]
        growing = [True] * len(prompts)
        # A token is a byte or more: a stop that has just come is within so many tokens.
        reach = max((len(stop.encode()) for stop in how.until), default=0)
        for token_B in decoder.tokens(how.max_new_tokens):
            for row, token in enumerate(token_B[: len(prompts)]):
                if growing[row] and token != self.eot_token_id:
                    drawn[row].append(token)
                    end = self.tok_decode(drawn[row][-reach:]) if reach else ""
                    growing[row] = not any(stop in end for stop in how.until)
                else:
                    growing[row] = False
            if not any(growing):
                break
        return [_cut(self.tok_decode(tokens), how.until) for tokens in drawn]


def _endings(model: LanguageModel, ids_BT: Tensor, counts: Sequence[int]) -> list[tuple[float, bool]]:
    """For each row: log p of its last `counts` tokens, and whether each of them was the likeliest."""
    x_BTD, _ = model.hidden(ids_BT[:, :-1])
    most = max(counts)
    log_p_BNV = model.logits(x_BTD[:, -most:]).log_softmax(-1)
    targets_BN = ids_BT[:, -most:]
    log_p_BN = log_p_BNV.gather(-1, targets_BN.unsqueeze(-1)).squeeze(-1).double()
    greedy_BN = log_p_BNV.argmax(-1) == targets_BN
    counted_BN = torch.arange(most, 0, -1, device=ids_BT.device) <= torch.tensor(counts, device=ids_BT.device)[:, None]
    nats_B = log_p_BN.masked_fill(~counted_BN, 0.0).sum(1)
    greedy_B = (greedy_BN | ~counted_BN).all(1)
    return list(zip(nats_B.tolist(), greedy_B.tolist(), strict=True))


def _batches(indices: Sequence[int], keys: Sequence[Hashable], rows: int) -> Iterator[list[int]]:
    """The indices in lists of at most `rows` whose keys are equal."""
    alike: dict[Hashable, list[int]] = {}
    for index in indices:
        alike.setdefault(keys[index], []).append(index)
    for group in alike.values():
        for start in range(0, len(group), rows):
            yield group[start : start + rows]


def _generation(arguments: dict[str, Any]) -> Generation:
    given = normalize_gen_kwargs(arguments, MAX_NEW_TOKENS)
    if unknown := sorted(set(given) - GENERATION):
        raise UserError(f"generation takes no {', '.join(unknown)}; it takes {', '.join(sorted(GENERATION))}")
    sampling = Sampling(
        temperature=given["temperature"] if given["do_sample"] else 0.0,
        top_k=given.get("top_k"),
        top_p=given.get("top_p"),
    )
    return Generation(given["max_gen_toks"], tuple(stop for stop in given["until"] if stop), sampling)


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.partition(stop)[0]
    return text


def _batch_size(asked: int | str | None, most: int | None) -> int:
    try:
        rows = BATCH_SIZE if asked in (None, "auto") else int(asked)
    except ValueError:
        rows = 0
    if rows < 1:
        raise UserError(f"the batch size is {asked!r}; give a whole number from 1 up, or auto")
    return min(rows, most or rows)
