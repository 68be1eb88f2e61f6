"""Fine-tuning and DPO through TRL, of a converted model, on made-up pairs; pairs that are none."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.posttrain import Pair, answer_logps, encode, made_up, read_pairs
from rodimus_lab.convert import Chat, ChatTokenizer, open_checkpoint, open_directory
from rodimus_lab.data import load_tokenizer
from rodimus_lab.errors import UserError
from rodimus_lab.nn.zoo import Size, model_config
from rodimus_lab.records import load_records, load_unfinished
from rodimus_lab.registry import load_plugins

HELLO = [{"role": "HUMAN", "content": "Hello"}]


@pytest.fixture
def tokenizer(places):
    return load_tokenizer("pydoc-4096")


def test_pairs_become_the_chat_format(tokenizer):
    pair = {"messages": HELLO, "system": "Be kind.", "chosen": "Hi.", "rejected": "No."}
    (found,) = encode({"pair 1": pair}, "dpo", ChatTokenizer(tokenizer), tokenizer.eos_id)
    assert tokenizer.decode(found.prompt) == Chat(HELLO, "Be kind.").prompt
    assert [tokenizer.decode(answer[:-1]) for answer in found.answers] == ["Hi.", "No."]
    assert [answer[-1] for answer in found.answers] == [tokenizer.eos_id] * 2


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ({"messages": [], "completion": "x"}, "do not end with one of HUMAN"),
        ({"messages": [*HELLO, {"role": "ASSISTANT", "content": "x"}], "completion": "y"}, "do not end with"),
        ({"messages": [{"role": "USER", "content": "x"}], "completion": "y"}, "unknown role 'USER'"),
        ({"messages": HELLO, "completion": ""}, "'completion' is no text"),
        ({"messages": HELLO, "completion": 3}, "'completion' is no text"),
        ({"messages": 3, "completion": "x"}, "'messages' is no list of objects"),
        ({"messages": ["x"], "completion": "x"}, "'messages' is no list of objects"),
        ({"messages": HELLO, "system": 5, "completion": "x"}, "'system' is no text"),
        ({"messages": HELLO, "completion": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_pairs_that_are_none(pair, said, tokenizer):
    with pytest.raises(UserError, match=said) as error:
        encode({"line 7 of pairs": pair}, "sft", ChatTokenizer(tokenizer), tokenizer.eos_id)
    assert str(error.value).startswith("line 7 of pairs: ")


def test_pairs_are_named_by_their_lines(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pair = {"messages": HELLO, "completion": "x"}
    path.write_text("\n\n".join(map(json.dumps, ["", pair, pair])).removeprefix('""'))
    assert read_pairs(path, "sft") == {f"line 3 of {path}": pair, f"line 5 of {path}": pair}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}\n", "line 1 of .* has no 'messages'"),
        (json.dumps({"messages": HELLO, "chosen": "x"}), "has no 'completion', which sft needs"),
        ("nothing\n", "line 1 of .* is no JSON object"),
        ('["messages", "completion"]\n', "line 1 of .* is no JSON object"),
        ('"messages completion"\n', "line 1 of .* is no JSON object"),
        (json.dumps({"messages": HELLO, "completion": "x"}), "fewer than two pairs"),
    ],
)
def test_files_that_are_none(tmp_path, text, said):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_pairs(path, "sft")
    with pytest.raises(UserError, match=r"none.jsonl cannot be read \(No such file"):
        read_pairs(tmp_path / "none.jsonl", "sft")


def test_made_up_pairs():
    assert len({json.dumps(pair) for pair in made_up("sft")}) == 100
    assert set(made_up("dpo")[0]) == {"messages", "chosen", "rejected"}


def test_what_an_answer_is_worth():
    load_plugins()
    model = model_config("rodimus", size=Size("tiny", 1, 32, 1, 61, 32)).build().eval()
    pair = Pair([3, 5, 7], ([11, 13], [17]))
    log_p = model(torch.tensor([[3, 5, 7, 11, 13]]))[0].log_softmax(-1)[0]
    (found,) = answer_logps(model, [pair], 0)
    assert found == pytest.approx((log_p[2, 11] + log_p[3, 13]).item(), abs=1e-4)


class TestTrl:
    @pytest.fixture(autouse=True)
    def _needed(self):
        pytest.importorskip("trl", reason="TRL is not installed (the extra posttrain)")

    @pytest.mark.parametrize("tied", [True, False])
    def test_the_loss_is_that_of_the_answers(self, tied):
        """TRL's, over the body and the head apart, with padding and with what does not count."""
        from trl.trainer.utils import add_fused_lm_head

        from rodimus_lab.hf import RodimusLabConfig
        from rodimus_lab.hf.trl import TrlModel

        load_plugins()
        config = model_config("rodimus", size=Size("tiny", 1, 32, 1, 61, 32), tie_embeddings=tied)
        model = TrlModel(RodimusLabConfig(config)).eval()
        ids = torch.tensor([[3, 5, 7, 11, 13], [2, 4, 6, 0, 0]])
        mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
        labels = torch.tensor([[-100, -100, -100, 11, 13], [-100, -100, 6, -100, -100]])
        plain = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        add_fused_lm_head(model)
        fused = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        pairs = [Pair([3, 5, 7], ([11, 13],)), Pair([2, 4], ([6],))]
        expected = -sum(answer_logps(model.lm, pairs, 0)) / 3
        assert plain.item() == pytest.approx(expected, abs=1e-4)
        assert fused.loss.item() == pytest.approx(expected, abs=1e-4)

    def test_fine_tuning_then_dpo_of_a_converted_model(self, cli, smoke_run):
        """Held-out answers are likelier after the one, and preferred after the other; the results chat."""
        converted = smoke_run.root / "converted"
        assert cli("convert", smoke_run.id, converted).code == 0
        command = ("posttrain", converted, "--budget", "smoke", "--device", "cpu", "--batch-size", 4, "--lr", 3e-3)
        result = cli(*command, "--steps", 20)
        assert result.code == 0, result.err
        (tuned,) = load_records(experiment="posttrain")
        assert tuned.metrics["valid_loss"] < tuned.metrics["valid_loss_before"] - 2
        assert (tuned.metrics["pairs"], tuned.metrics["held_out"]) == (90, 10)
        folder = smoke_run.root / "checkpoints" / "posttrain" / tuned.id
        assert "ASSISTANT" in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
        before, after = open_checkpoint(converted), open_directory(folder)
        assert before.config == after.config
        assert any(not torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)
        again = cli(*command, "--steps", 20)
        assert "is finished" in again.out
        result = cli("posttrain", folder, *command[2:], "--steps", 8, "--method", "dpo")
        assert result.code == 0, result.err
        (preferring,) = [record for record in load_records(experiment="posttrain") if record.id != tuned.id]
        assert preferring.recipe["beta"] == 0.1
        assert preferring.metrics["accuracy"] > 0.8
        assert preferring.metrics["margin"] > 0
        said = cli(
            "chat", folder, "--message", "Say the word moon.", "--max-new-tokens", 3, "--seed", 1, "--device", "cpu"
        )
        assert said.code == 0, said.err

    @pytest.mark.parametrize("method", ["sft", "dpo"])
    def test_a_loss_that_is_not_finite(self, cli, smoke_run, method):
        """One sentence with the step, and nothing is left that looks as if it could go on."""
        command = ("posttrain", smoke_run.id, "--budget", "smoke", "--device", "cpu", "--batch-size", 2, "--steps", 4)
        result = cli(*command, "--lr", 1e30, "--method", method)
        assert result.code == 2, result
        said = result.err.splitlines()[-1]  # Bars of progress are before it.
        assert said.startswith("error: the loss of ")
        assert "is not finite at step " in said
        assert said.endswith("give a lower --lr than 1e+30")
        assert "Traceback" not in result.err
        assert not [run for run in load_unfinished(None) if run.experiment == "posttrain"]
        assert not list((smoke_run.root / "checkpoints" / "posttrain").glob("*"))

    @pytest.mark.parametrize("cut", ["before the config", "before the record"])
    def test_a_result_that_was_cut_off_is_written_again(self, cli, smoke_run, cut):
        command = ("posttrain", smoke_run.id, "--budget", "smoke", "--device", "cpu", "--batch-size", 2, "--steps", 2)
        assert cli(*command).code == 0
        (record,) = load_records(experiment="posttrain")
        folder = smoke_run.root / "checkpoints" / "posttrain" / record.id
        lines = (record.path / "metrics.jsonl").read_text()
        (record.path / "record.json").unlink()
        if cut == "before the config":
            (folder / "config.json").unlink()
        result = cli(*command)
        assert result.code == 0, result.err
        (again,) = load_records(experiment="posttrain")
        assert again.metrics == record.metrics
        assert (again.path / "metrics.jsonl").read_text() == lines
        assert open_directory(folder).config == open_checkpoint(smoke_run.id).config

    def test_what_is_refused(self, cli, smoke_run, tmp_path):
        for arguments, said in (
            ((), "give --pairs FILE, or --budget smoke"),
            (("--pairs", tmp_path / "none.jsonl"), "none.jsonl cannot be read"),
            (("--budget", "smoke", "--max-length", 2), "only 0 pairs are of at most 2 tokens"),
            (("--method", "ppo"), "--method"),
            (("--budget", "smoke", "--lr", 0), "--lr is 0; give a finite number above 0"),
            (("--budget", "smoke", "--method", "dpo", "--beta", "inf"), "--beta is inf; give a finite number"),
        ):
            result = cli("posttrain", smoke_run.id, *arguments)
            assert result.code == 2
            assert said in result.err
            assert result.err.count("\n") == 1


def test_without_trl(cli, smoke_run, monkeypatch):
    monkeypatch.setattr("rodimus_lab.command.find_spec", lambda name: None)
    result = cli("posttrain", smoke_run.id, "--budget", "smoke")
    assert result.code == 2
    assert "the package trl is not installed; run: pip install -e '.[posttrain]'" in result.err
