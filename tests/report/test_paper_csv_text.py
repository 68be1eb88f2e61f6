"""Every cell of the paper's tables against the paper's text, where that lies beside the project.

The text is damaged in places. `REPAIRS` lists all that is put right, each as damaged text -> what stands in the CSV;
a repair that no longer finds its damage fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest

from rodimus_lab.records import PROJECT_ROOT
from rodimus_lab.report import PaperRow, paper_table

PAPER = PROJECT_ROOT.parent / "shared" / "paper" / "paper.md"
pytestmark = pytest.mark.skipif(not PAPER.exists(), reason="the paper's text is not beside the project")

NAMES = {
    "Rodimus": "rodimus",
    "Rodimus+": "rodimus+",
    "Rodimus +": "rodimus+",
    "Mamba": "mamba",
    "Mamba2": "mamba2",
    "Transformer (torch)": "transformer (torch)",
    "Transformer (F.A.)": "transformer (F.A.)",
    "Transformer++": "transformer++",
    "Transformer++-SWA": "transformer++-swa",
    "StreamingLLM": "streaming_llm",
    "Llama3": "llama3",
    "GLA": "gla",
    "HGRN": "hgrn",
    "HGRN2": "hgrn2",
    "RetNet": "retnet",
    "gRetNet": "gretnet",
    "RWKV4": "rwkv4",
    "RWKV6": "rwkv6",
    "L.A.": "linear_attention",
    "Hawk": "hawk",
    "S4D": "s4d",
    "Rec-Gemma": "RecurrentGemma",
}

# Table number -> the starts of its last header line and of its last line.
PLACES = {
    1: ("Models\tTest PPL", "HGRN2\t"),
    2: ("Model\t(B)\t(B)\tTokenizer", "Rodimus+\t1.6"),
    3: ("Notation\tSize", "$oldsymbol{d}_t"),
    4: ("Model\tGate Dim", "Rodimus\t"),
    5: ("", "Gradient clipping"),
    6: ("Model\tValid PPL", "Rodimus+\t"),
    7: ("Model\t1.2M Bytes", "Rodimus\t"),
    8: ("Params\tn_layer", "1.3B\t"),
    9: ("Params (B)\tTokenizer\tTraining", "1.4\t"),
    10: ("Model\tParams (B)\tTokens (B)", "Rodimus <sup>£</sup>\t1.4"),
    11: ("Model\tSWDE", "Rodimus +\t"),
    12: ("$\\ell$\tValid PPL", "128\t"),
    13: ("n\tValid PPL", "256\t"),
    14: ("Model\tHead Type", "Rodimus+\tSKA"),
    15: ("$oldsymbol{eta}_t$\t$oldsymbol{g}_t$", "<u> </u>"),
    16: ("$\\beta_t = ?$", "$rac{\\prod"),
    17: ("$\\overline{L}$\tTHR", "24\tX\t\t21.52"),
    18: ("Configuration\tWikiText-103", "X + Rodimus"),
    19: ("Wiodei\tFLOPs $", "Rodimus+\t4.29"),
    20: ("Wiodei\tFLOPs ×", "Rodimus+\t3.5"),
    21: ("Datasets\tQwen2.5- Coder-1.5B", "Overall\t"),
    22: ("Datasets\tQwen2.5-Coder- 1.5B", "Mathematics Avg."),
}

# LaTeX commands of which the first letters are lost.
LATEX = [
    ("{eta}", r"{\beta}"),
    ("{ au}", r"{\tau}"),
]
REPAIRS: dict[int, list[tuple[str, str]]] = {
    2: [
        ("Manufact\t0.12\t100\tNasv\t22.72\t46.84\t22.27\t10.72\t40.22\t20.80\t65.07\t52.17\t41.61\n", ""),
        ("23.72\t\t33.37", "23.72\t46.84\t33.37"),
        ("65.07\t\t41.61", "65.07\t52.17\t41.61"),
        ("<b>3</b> 5.77", "55.77"),
    ],
    3: [
        ("$oldsymbol{W}_{\\hat{eta}}^{^{ ho}}$", r"$W_{\hat{\beta}}^2$"),
        ("$oldsymbol{b}_{\\hat{eta}}^{^{^{ ho}}}$", r"$b_{\hat{\beta}}$"),
        ("$oldsymbol{d}_t^{\\scriptscriptstyle eta}$", "$d_t$"),
        ("0\t$T \\times d$", "O\t$T \\times d$"),
        (r"\hat{m{lpha}}", r"\hat{\alpha}"),
        ("{lpha}", r"{\alpha}"),
        ("$lpha", r"$\alpha"),
        ("$ au", r"$\tau"),
        *LATEX,
    ],
    4: [
        ("ig(", "("),
        ("ig)", ")"),
        ("{ op}", r"{\top}"),
        ("^ op", r"^\top"),
        ("1/ au", r"1/\tau"),
        (" ight", r"\right"),
        *LATEX,
    ],
    10: [
        (
            "Mamba <sup>£</sup> Mamba2 <sup>£</sup>\t0.13 0.13\t100 100\tNeoX NeoX\t23.72 23.81\t46.84 45.50\t"
            "33.37 34.13\t19.72 20.42\t40.33 39.55\t29.80 29.20\t65.07 64.47\t<b>52.17</b> <u>51.85</u>\t41.61 41.22\n",
            "Mamba\t0.13\t100\tNeoX\t23.72\t46.84\t33.37\t19.72\t40.33\t29.80\t65.07\t52.17\t41.61\n"
            "Mamba2\t0.13\t100\tNeoX\t23.81\t45.50\t34.13\t20.42\t39.55\t29.20\t64.47\t51.85\t41.22\n",
        ),
        (
            "Rodimus <sup>£</sup> Mamba2 <sup>£</sup>\t0.13\t100 100\tNeoX NeoX\t23.38\t<b>46.84</b> 56.06\t"
            "<b>34.22</b> <u>48.74</u>\t17.95 8.22\t<u>42.44</u> <u>55.25</u>\t30.00 33.40\t70.57\t"
            "51.46 54.14\t41.96 49.24\n",
            "Rodimus\t0.13\t100\tNeoX\t23.38\t46.84\t34.22\t17.95\t42.44\t30.00\t65.40\t51.46\t41.96\n"
            "Mamba2\t1.4\t100\tNeoX\t26.52\t56.06\t48.74\t8.22\t55.25\t33.40\t70.57\t54.14\t49.24\n",
        ),
    ],
    15: [("<u> </u>", "✓")],
    16: [
        (
            "$rac{\\prod_{j=i+1}^t oldsymbol{eta}_j}{1_m}$\t24.36 23.24\t23.32 22.20",
            "$\\prod_{j=i+1}^t \\beta_j$\t24.36\t23.32\n$1_m$\t23.24\t22.20",
        )
    ],
    17: [("6\t✓.\t1\t", "6\t✓\t"), ("24\t✓.\t\t", "24\t✓\t"), ("X\t\t", "X\t")],
    20: [("OOM", "")],
    21: [("HumanEval\t\t\t\t\t\t\t", "HumanEval\t41.5\t51.2\t19.5\t51.8\t60.4\t36.0\t60.4")],
    22: [("62.0\t=\t61.6", "62.0\t-\t61.6")],
}


def body(table: int) -> list[list[str]]:
    """The rows of a table in the text, repaired, as plain cells."""
    text = PAPER.read_text()
    first, last = PLACES[table]
    start = text.index("Dataset\tWikiText-103\t") if not first else text.index("\n", text.index("\n" + first) + 1) + 1
    end = text.index("\n", text.index("\n" + last, start - 1) + 1) + 1
    text = text[start:end]
    for damaged, repaired in REPAIRS.get(table, []):
        assert damaged in text, f"Table {table} has no {damaged!r} to repair"
        text = text.replace(damaged, repaired)
    rows = [[plain(cell) for cell in line.split("\t")] for line in text.splitlines() if line.count("\t")]
    rows = [row for row in map(trimmed, rows) if len(row) > 1 and row[0]]
    return [[NAMES.get(row[0], row[0]), *row[1:]] for row in rows]


def plain(cell: str) -> str:
    """A cell without emphasis, citations and LaTeX fonts; ticks and crosses as words; a dash as nothing."""
    cell = re.sub(r"<sup>£</sup>|<[^>]*>|\*\*", "", cell).strip()
    cell = re.sub(r" \([A-Z][^()]*\d{4}[ab]?\)$", "", cell)
    cell = re.sub(r"^\$\\overline\{([\w.]+)\}\$$", r"\1", cell)
    return {"✓": "yes", r"$\checkmark$": "yes", "X": "no", "×": "no", "-": ""}.get(cell, cell)


def trimmed(row: Sequence[str]) -> list[str]:
    row = list(row)
    while row and not row[-1]:
        row.pop()
    return row


def bare(latex: str) -> str:
    """LaTeX without fonts, sizes, braces and spaces."""
    return re.sub(r"(\\b)?oldsymbol|\\left|\\right|[${}\s]", "", latex)


def text(row: PaperRow, *columns: str) -> list[str]:
    values = [row[column] for column in columns]
    return ["" if value is None else str(getattr(value, "text", value)) for value in values]


def straight(*left_out: str) -> Callable[[list[PaperRow]], list[list[str]]]:
    return lambda rows: [text(row, *(name for name in row if name not in left_out)) for row in rows]


def spread(row_by: str, column_by: str, *values: str) -> Callable[[list[PaperRow]], list[list[str]]]:
    """A long table made wide again: `values` side by side for every `column_by`, which the text has as headings."""

    def layout(rows: list[PaperRow]) -> list[list[str]]:
        columns = list(dict.fromkeys(text(row, column_by)[0] for row in rows))
        names = list(dict.fromkeys(text(row, row_by)[0] for row in rows))
        cells = {tuple(text(row, row_by, column_by)): text(row, *values) for row in rows}
        return [[name, *(value for column in columns for value in cells[name, column])] for name in names]

    return layout


def settings(rows: list[PaperRow]) -> list[list[str]]:
    """Table 5 stands on its side."""
    return [list(column) for column in zip(*(text(row, *row) for row in rows), strict=True)]


def scaling(rows: list[PaperRow]) -> list[list[str]]:
    laid = []
    for row in rows:
        size, layers, width, heads, head, steps, lr, batch, tokens = text(row, *row)
        laid.append([size, layers, width, f"{heads}/{head}", steps, lr, f"{batch}M", f"{tokens}B"])
    return laid


def downstream_training(rows: list[PaperRow]) -> list[list[str]]:
    return [[*row[:3], f"{row[3]}M", *row[4:]] for row in straight()(rows)]


def costs(*values: str) -> Callable[[list[PaperRow]], list[list[str]]]:
    def layout(rows: list[PaperRow]) -> list[list[str]]:
        how = [
            {"model": f"{row['model']} ({row['implementation']})" if row["implementation"] else row["model"]}
            for row in rows
        ]
        return spread("model", "context_k", *values)([{**row, **name} for row, name in zip(rows, how, strict=True)])

    return layout


LAYOUTS: dict[int, Callable[[list[PaperRow]], list[list[str]]]] = {
    **{table: straight() for table in (1, 3, 4, 6, 10, 11, 14, 15, 16, 17)},
    2: straight("same_setup", "group"),
    5: settings,
    7: spread("model", "cache_mb", "valid_ppl"),
    8: scaling,
    9: downstream_training,
    12: spread("rank", "size", "valid_ppl", "params_m"),
    13: lambda rows: spread("expansion", "size", "valid_ppl", "params_m")([*rows[5:], *rows[:5]]),
    18: spread("order", "corpus", "ppl"),
    19: costs("flops_1e13", "throughput_wps"),
    20: costs("flops_1e9", "throughput_wps", "cache_mb"),
    21: spread("benchmark", "model", "score"),
    22: lambda rows: spread("benchmark", "model", "score")([row for row in rows if row["benchmark"] != "Overall"]),
}


@pytest.mark.parametrize("table", sorted(LAYOUTS))
def test_every_cell_of_a_table(table):
    expected = body(table)
    found = [trimmed(row) for row in LAYOUTS[table](paper_table(table))]
    if table == 5:
        expected = [row[1:] for row in expected]
    if table == 14:
        expected = [[row[0], row[1].lower(), *row[2:]] for row in expected]
    if table in (3, 4, 16):
        expected, found = ([[bare(cell) for cell in row] for row in rows] for rows in (expected, found))
    assert found == expected


def test_all_tables_are_compared():
    assert sorted(LAYOUTS) == sorted(PLACES) == list(range(1, 23))


def test_headings_of_the_long_tables():
    """The heads that `spread` takes from the CSVs stand over the columns of the text in the same order."""
    text_of_paper = PAPER.read_text()
    for table in (21, 22):
        header = text_of_paper[text_of_paper.index(PLACES[table][0]) :].splitlines()[0]
        heads = [re.sub(r"[- ]+", "-", head) for head in trimmed(header.split("\t"))[1:]]
        assert list(dict.fromkeys(row["model"] for row in paper_table(table))) == heads
    heads = [text(row, "cache_mb")[0] for row in paper_table(7)[:4]]
    assert "Model\t" + "\t".join(f"{head}M Bytes" for head in heads) in text_of_paper


def test_the_scattered_overall_row_of_table_22():
    scattered = PAPER.read_text()
    scattered = scattered[scattered.index("#### E.3.2") : scattered.index("## F DISCUSSION")]
    printed = re.findall(r"^(\d+\.\d)$", scattered, re.M)
    ours = [text(row, "score")[0] for row in paper_table(22) if row["benchmark"] == "Overall"]
    assert sorted(printed) == sorted(filter(None, ours))


def test_oom_is_where_the_text_has_it():
    rows = [row for row in paper_table(20) if row["note"] == "OOM"]
    assert [(row["model"], row["implementation"], row["context_k"]) for row in rows] == [("transformer", "torch", 24)]
    assert PAPER.read_text().count("7.7\tOOM\t4831.8") == 1
