"""What is evaluated: runs of this project, and models that transformers reads."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec

import pytest

from rodimus_lab.data.tokenizers import train_bpe
from rodimus_lab.errors import UserError

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval)")
pytest.importorskip("accelerate", reason="accelerate is not installed (the extra eval)")
pytest.importorskip("transformers", reason="transformers is not installed (the extra eval)")

import transformers

from evals.lmeval.subject import LoadOptions, find_subject
from rodimus_lab.records import FROM_FOLDER, load_records

WORDS = "the cat sat on a mat, and then it ran.\n"
SHAPES = {
    "attention": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ),
    "recurrent": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
    ),
}


@pytest.fixture(params=SHAPES)
def kind(request):
    return request.param


@pytest.fixture
def published(tmp_path, kind):
    """A tiny model as transformers saves it."""
    folder = tmp_path / f"Tiny {kind}"
    SHAPES[kind]().save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=train_bpe([WORDS] * 20, 300), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_of_transformers(cli, places, published, kind):
    if find_spec("fla"):  # It puts its classes where transformers has its own.
        import_module("fla.models")
    items = places / "items"
    items.mkdir()
    rows = [
        {"context": f"the cat sat {'on a mat, ' * number}and then it", "continuation": "ran"} for number in range(5)
    ]
    (items / "lambada_openai.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = cli("eval", published, "--suite", "lambada_openai", "--data-dir", items, "--device", "cpu")
    assert result.code == 0, result.err
    (record,) = load_records(experiment="eval")
    assert record.label == f"tiny-{kind}"
    assert record.corpus == FROM_FOLDER
    assert record.budget_text == "training not known, all items from local files"
    assert record.recipe["model"]["name"] == f"Tiny {kind}"
    assert len(record.recipe["model"]["weights"]) == 16
    assert record.metrics["lambada_openai.items"] == 5
    assert record.metrics["lambada_openai.perplexity"] > 1


def test_recurrent_models_run_one_by_one(published, kind):
    model = find_subject(str(published), LoadOptions(device="cpu")).load()
    assert model.batch_size == {"attention": 8, "recurrent": 1}[kind]
    assert find_subject(str(published), LoadOptions(device="cpu", batch_size=3)).load().batch_size == 3


def test_other_weights_are_another_model(published, kind):
    first = find_subject(str(published), LoadOptions()).identity
    SHAPES[kind]().save_pretrained(published)
    assert find_subject(str(published), LoadOptions()).identity != first


def test_a_run(smoke_run):
    subject = find_subject(smoke_run.id, LoadOptions(device="cpu"))
    assert (subject.label, subject.corpus, subject.tokenizer) == ("rodimus", "pydoc", "pydoc-4096")
    assert subject.identity["name"] == f"wikitext103/{smoke_run.id}"
    assert subject.facts["trained_tokens"] == 4 * 8 * 256
    assert subject.facts["params"] == sum(p.numel() for p in subject.load().model.parameters())


@pytest.mark.parametrize("layout", ["native", "official", "saved"])
def test_a_directory_scores_as_its_run(cli, smoke_run, layout):
    """Converted from the run, or saved by transformers: scored by the same adapter, to the same numbers."""
    import rodimus_lab.hf  # noqa: F401

    folder, items = smoke_run.root / "Exported", smoke_run.root / "items"
    to = "official" if layout == "official" else "native"
    assert cli("convert", smoke_run.id, folder, "--to", to).code == 0
    if layout == "saved":
        classes = (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
        parts = [kind.from_pretrained(folder) for kind in classes]
        folder = smoke_run.root / "Saved"
        for part in parts:
            part.save_pretrained(folder)
    items.mkdir()
    (items / "piqa.jsonl").write_text(
        "\n".join(
            json.dumps({"query": f"To cut {n}\n", "choices": ["use a knife", "a spoon"], "gold": n % 2})
            for n in range(6)
        )
    )
    command = ("eval", smoke_run.id, folder, "--suite", "piqa", "--data-dir", items, "--device", "cpu")
    result = cli(*command)
    assert result.code == 0, result.err
    run, other = sorted(load_records(experiment="eval"), key=lambda record: record.label != "rodimus")
    assert other.label == folder.name.lower()
    assert (other.corpus, other.recipe["model"]["source"]) == (FROM_FOLDER, "folder")
    assert other.metrics["params"] == run.metrics["params"]
    assert other.metrics["piqa.acc_norm"] == run.metrics["piqa.acc_norm"]
    assert cli("report", "table2").code == 0


def test_a_folder_that_transformers_cannot_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(UserError, match="is no run of this project, and transformers cannot read it"):
        find_subject(str(tmp_path), LoadOptions())


def test_fresh_weights_are_of_our_models():
    with pytest.raises(UserError, match="nobody/nothing is not"):
        find_subject("nobody/nothing", LoadOptions(), fresh=True)
