"""One site for all tests of it: of the committed runs of Table 1, of a run whose record is hostile, and of scores and
gates of the first of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from committed_runs import WIKITEXT103, copy_three
from sharing import made_once

from rodimus_lab.records import PROJECT_ROOT
from rodimus_lab.site import build_site

HOSTILE = '</td><script>window.broken=1</script><img src=x onerror="window.broken=1">'
HOSTILE_RUN = "rodimus-0badc0de"
SCORED_RUN = "rodimus-0badf00d"
GATES_RUN = "rodimus-0badcafe"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "results", make) / "site"


def make(root: Path) -> None:
    copy_three(root / "runs")
    shutil.copytree(PROJECT_ROOT / "results" / "figures", root / "figures")
    (root / "figures" / "figure01b.csv").write_text("other numbers\n")
    run = root / "runs" / "wikitext103" / HOSTILE_RUN
    shutil.copytree(WIKITEXT103 / "rodimus-b6357da5", run)
    record = json.loads((run / "record.json").read_text())
    record |= {"id": HOSTILE_RUN, "corpus": HOSTILE, "device": HOSTILE, "commit": HOSTILE}
    record["metrics"][HOSTILE] = 1.5
    (run / "record.json").write_text(json.dumps(record))
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["data"]["corpus"] = HOSTILE
    (run / "recipe.json").write_text(json.dumps(recipe | {HOSTILE: HOSTILE}))
    (run / "env.json").write_text(json.dumps({HOSTILE: [HOSTILE]}))
    (run / "samples.jsonl").write_text(json.dumps({"prompt": HOSTILE, "text": "more"}) + "\nno sample\n")
    scored = root / "runs" / "eval" / SCORED_RUN
    shutil.copytree(WIKITEXT103 / "rodimus-b6357da5", scored)
    record = json.loads((scored / "record.json").read_text())
    record |= {"experiment": "eval", "id": SCORED_RUN, "metrics": {"recall_squad.contains": 0.25}}
    (scored / "record.json").write_text(json.dumps(record))
    model = {"source": "run", "name": "wikitext103/rodimus-b6357da5"}
    (scored / "recipe.json").write_text(json.dumps({"model": model, "data": {"source": "local files"}}))
    gates = root / "runs" / "gates" / GATES_RUN
    shutil.copytree(WIKITEXT103 / "rodimus-b6357da5", gates)
    record = json.loads((gates / "record.json").read_text())
    (gates / "record.json").write_text(json.dumps(record | {"experiment": "gates", "id": GATES_RUN}))
    of = model | {"corpus": record["corpus"], "budget": record["budget"]}
    where = {"layer": 6, "layers": 12, "tokenizer": {"name": "gpt2"}, "device": "cpu"}
    (gates / "recipe.json").write_text(json.dumps({"model": of, "beside": None} | where))
    lines = [{"token": token, "g": [0.5, 0.1], "tau": [0.5, 0.2]} for token in ("They", " run", "<b>")]
    (gates / "gates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RODIMUS_LAB_RESULTS", str(root / "runs"))
        build_site(root / "site")
