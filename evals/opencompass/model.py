"""A model of this project as OpenCompass asks for it. Imported in OpenCompass's environment only.

Legend: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from opencompass.models.base import BaseModel

from rodimus_lab.convert import open_checkpoint
from rodimus_lab.decoder import Decoder
from rodimus_lab.device import device_type
from rodimus_lab.errors import UserError
from rodimus_lab.sampling import Sampling
from rodimus_lab.scoring import scoring

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RodimusLab(BaseModel):
    """`path` is a run id or a checkpoint directory of any layout. Answers are greedy.

    A prompt of more than `max_seq_len` tokens less those of its answer loses its first ones. Raises `UserError`.
    """

    def __init__(
        self,
        path: str,
        max_seq_len: int = 2048,
        tokenizer_only: bool = False,
        meta_template: dict[str, Any] | None = None,
        device: str | None = None,
        dtype: str = "float32",
        **options: Any,
    ):
        super().__init__(path, max_seq_len, tokenizer_only, meta_template, **options)
        checkpoint = open_checkpoint(path)
        self.tokenizer = checkpoint.tokenizer()
        if dtype not in DTYPES:
            raise UserError(f"{dtype!r} is not a dtype that models are evaluated in; choose {' or '.join(DTYPES)}")
        if not tokenizer_only:
            self.model = checkpoint.build(device=device or device_type(), dtype=DTYPES[dtype])

    def generate(self, inputs: list[str], max_out_len: int = 100, **_: Any) -> list[str]:
        """The likeliest continuations, up to an end-of-document token or `max_out_len` tokens."""
        room = self.max_seq_len - max_out_len
        if room < 1:
            raise UserError(f"{max_out_len} new tokens leave no room in max_seq_len {self.max_seq_len}")
        prompts = [self.tokenizer.encode(str(text))[-room:] for text in inputs]
        eos = self.tokenizer.eos_id
        rows: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        with scoring(self.model):
            context = max(map(len, prompts)) + max_out_len
            decoder = Decoder(self.model, len(prompts), context, Sampling(temperature=0), stop=[eos])
            decoder.prefill(prompts)
            for token_B in decoder.tokens(max_out_len):
                for row, token in enumerate(token_B):
                    ended[row] = ended[row] or token == eos
                    if not ended[row]:
                        rows[row].append(token)
                if all(ended):
                    break
        return [self.tokenizer.decode(row) for row in rows]

    def get_ppl(self, inputs: list[str], mask_length: list[int] | None = None) -> list[float]:
        """Nats a token of each text after its first `mask_length` tokens, divided as OpenCompass's own class for
        transformers divides them: by all tokens, the first included, less the masked ones."""
        found = []
        with scoring(self.model):
            for number, text in enumerate(inputs):
                ids = self.tokenizer.encode(str(text))[: self.max_seq_len]
                ids_BT = torch.tensor([ids], device=self.model.embedding.weight.device)
                log_p_BTV = self.model(ids_BT[:, :-1])[0].float().log_softmax(-1)
                log_p_T = log_p_BTV.gather(-1, ids_BT[:, 1:, None])[0, :, 0].double()
                masked = mask_length[number] if mask_length is not None else 0
                found.append(-log_p_T[max(0, masked - 1) :].sum().item() / (len(ids) - masked))
        return found

    def get_token_len(self, prompt: str) -> int:
        return len(self.tokenizer.encode(str(prompt)))
