import csv
import json
import re
from html.parser import HTMLParser

import pytest

from data_prep.errors import UserError
from tests.reporting.conftest import rate
from trainer.reporting import html

UNSAFE = '<script>alert("x")</script> & $y_1$'
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """What a browser would make of the page: attributes, nesting, and the figures of the table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.figures: dict[str, list[float]] = {}
        self.text: list[str] = []
        self._row: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self._row = values.get("data-figure")
        if tag == "data" and self._row is not None:
            self.figures.setdefault(self._row, []).append(float(values["value"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def page_of(run_dir):
    path = html.write(run_dir)
    assert path == run_dir / "report.html" and not (run_dir / "report.html.partial").exists()
    return read_page(path)


def read_page(path):
    text = path.read_text(encoding="utf-8").replace("\u00a0", " ")
    page = Page(text)
    assert page.open == []
    return text, page


def flat(metrics, prefix=""):
    for key, value in metrics.items():
        if isinstance(value, dict) and "rate" in value:
            yield prefix + key, value
        elif isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")


def change(run_dir, edit):
    path = run_dir / "evaluation.json"
    stored = json.loads(path.read_text())
    edit(stored)
    path.write_text(json.dumps(stored))


def test_the_page_loads_nothing_from_anywhere(finished):
    text, page = read_page(finished / "report.html")
    for tag, name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "data", "action", "poster", "srcset"}:
            assert value.startswith(("#", "data:image/png;base64,")), f"<{tag} {name}={value[:60]}>"
        assert not re.search(r"url\(\s*['\"]?(?!#)", value), f"<{tag} {name}={value[:60]}>"
    assert not {tag for tag, _, _ in page.attributes} & {"script", "link", "iframe", "object", "embed"}
    assert "@import" not in text and not re.search(r"https?://", text)
    assert text.count("<style>") == 1


def test_every_figure_of_the_table_equals_the_evaluation(finished):
    _, page = read_page(finished / "report.html")
    stored = json.loads((finished / "evaluation.json").read_text())
    before, after = dict(flat(stored["before"])), dict(flat(stored["after"]))
    control = dict(flat(stored["diagnostics"]["random_control"]))
    assert page.figures.keys() == before.keys() == after.keys()
    for key, shown in page.figures.items():
        expected = [before[key]["rate"], after[key]["rate"]]
        assert shown == expected + ([control[key]["rate"]] if key in control else [])


def test_every_figure_stands_as_numbers_in_a_csv_beside_the_report(finished):
    stored = json.loads((finished / "evaluation.json").read_text())
    sides = {side: dict(flat(stored[side])) for side in ("before", "after")}
    sides["random_experts"] = dict(flat(stored["diagnostics"]["random_control"]))
    rows = {row["figure"]: row for row in csv.DictReader((finished / "figures.csv").open(encoding="utf-8"))}
    assert rows.keys() == sides["before"].keys()
    for key, row in rows.items():
        for side, found in sides.items():
            shown = [row[f"{side}_{part}"] for part in ("rate", "low", "high", "n")]
            expected = found.get(key)
            if expected is None:
                assert shown == ["", "", "", ""]
            else:
                assert [float(cell) for cell in shown] == [expected["rate"], *expected["ci95"], expected["n"]]


def test_experts_that_were_found_and_not_trained_are_called_that(run_dir):
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "repair: {scope: attention}\n")
    assert "Critical experts found, none of them trained" in " ".join(page_of(run_dir)[1].text)


def test_intervals_sizes_and_changes_are_written_beside_the_rates(finished):
    text, _ = read_page(finished / "report.html")
    row = text[text.index('data-figure="asr_unseen"') :]
    row = row[: row.index("</tr>")]
    assert "99.0 %" in row and "31.0 %" in row and "n = 100" in row and "2 unjudged" in row
    assert "[22.8, 40.6]" in row and "\u221268.0" in row and "36.0 %" in row


def test_what_each_stage_was_given_and_did_is_shown_and_a_stage_without_effect_is_called_that(finished):
    _, page = read_page(finished / "report.html")
    words = " ".join(" ".join(page.text).split())
    assert "repair-1 0.0280 \u2192 0.0254 0.0280 \u2192 0.0254 0.0280 \u2192 0.0254 yes" in words
    assert "0.0254 NONE" in words
    assert "Stage consistency-1 had no effect: routing gap, kl in nats went from 0.0280 to 0.0254" in words
    assert "1-repair-1 wrapped benign 7 1 2 9 answered with a refusal" in words
    assert "Stage 1-repair-1 dropped 9 of 16 rows 'wrapped benign'." in words


def test_unsafe_text_is_escaped_everywhere(finished):
    text, page = read_page(finished / "report.html")
    assert "<script" not in text
    # In the recipe, in the table and as a tick label of the chart of families.
    assert "".join(page.text).count('<script>alert("x")</script>') >= 3
    assert "$y_1$" in "".join(page.text)


def test_ids_are_unique_and_every_reference_inside_the_page_resolves(finished):
    text, page = read_page(finished / "report.html")
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert targets <= set(ids)


def test_the_headline_says_what_the_intervals_allow(run_dir):
    text, _ = page_of(run_dir)
    verdict = re.search(r'<p class="verdict">(.*?)</p>', text).group(1)
    assert verdict.startswith("Attack success dropped on seen and unseen families, at a cost:")
    assert "fewer wrapped harmless requests" in verdict and "borderline" not in verdict
    change(run_dir, lambda stored: stored.update(after=stored["before"]))
    assert "Attack success did not clearly drop." in page_of(run_dir)[0]


def test_cautions_name_what_weakens_the_claim(run_dir):
    text, _ = page_of(run_dir)
    found = text[text.index('id="cautions"') : text.index('id="figures"')]
    for words in (
        "rises by 14.0 points",
        "Random experts: 36.0 %, not clearly worse than this repair (31.0 %)",
        "Unseen families still succeed more often",
        "Degenerate replies rose",
        "could not read count against the model in: Attack success, unseen families (2)",
        "Fewer than 50 items, so wide intervals, in: Capability: sums",
    ):
        assert words in found
    assert "seen families'" not in found.replace("unseen families'", "")
    change(run_dir, lambda stored: stored["diagnostics"].update(untouched_identical=False, gate_weights_changed=0))
    text, _ = page_of(run_dir)
    assert "Weights that should not have moved differ" in text and "changed no gate weight" in text


def test_pairs_appear_as_counts_only(finished):
    text, page = read_page(finished / "report.html")
    words = " ".join(" ".join(page.text).split())
    assert "answered inside the jailbreak 60" in words and "the jailbreak was refused too 7" in words
    assert "NEVER SHOWN" not in text and "goals:1" not in text


def test_costs_and_sizes_are_in_human_units(finished):
    words = " ".join(" ".join(read_page(finished / "report.html")[1].text).split())
    assert "6 min 52 s" in words and "80 MB GPU, 1,500 MB host" in words and "7 min 34 s" in words
    assert "24 of 192 (12.5 %)" in words and "1,769,472 of 15,600,000 (11.3 %)" in words
    assert words.index("1-repair-1") < words.index("2-consistency-1") < words.index("10-repair-5")


OPTIONAL = ["recipe.yaml", "manifest.json", "pairs.jsonl", "activations.parquet", "expert_set.json", "audit.json"]


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_missing_artefact_is_said_and_the_rest_stays(run_dir, name):
    (run_dir / name).unlink()
    text, page = page_of(run_dir)
    assert name in text and 'class="absent"' in text and page.figures


def test_evaluation_alone_is_enough(run_dir, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    stored = json.loads((run_dir / "evaluation.json").read_text())
    (bare / "evaluation.json").write_text(json.dumps({"before": stored["before"], "after": stored["after"]}))
    text, page = page_of(bare)
    assert set(page.figures) == set(dict(flat(stored["before"])))
    for name in [*OPTIONAL, "drift_per_layer", "stages/*/log.json"]:
        assert name in text


def test_figures_of_other_methods_are_shown_under_their_own_key(run_dir):
    extra = {"rate": 0.25, "n": 4, "ci95": [0.05, 0.7], "unjudged": 0}
    change(run_dir, lambda stored: stored["after"].update(leaks={"deep": extra}))
    _, page = page_of(run_dir)
    assert page.figures["leaks.deep"] == [0.25]


def test_without_evaluation_there_is_no_report(run_dir):
    (run_dir / "evaluation.json").write_text('{"before": {}}')
    with pytest.raises(UserError, match="after: the key is missing"):
        html.write(run_dir)
    (run_dir / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"evaluation\.json not found"):
        html.write(run_dir)


@pytest.mark.parametrize(
    ("name", "content"),
    [("manifest.json", "{"), ("pairs.jsonl", '{"a": 1}\n[]\n'), ("audit.json", "[]"), ("recipe.yaml", "a: [")],
)
def test_a_broken_artefact_is_named(run_dir, name, content):
    (run_dir / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(name)):
        html.write(run_dir)


def test_how_long_replies_are_and_who_ended_them_stands_beside_the_figures(run_dir):
    found = json.loads((run_dir / "evaluation.json").read_text())
    for side, cut in (("before", 0), ("after", 7)):
        length = {"mean": 34.0 if side == "before" else 26.5, "median": 25.0, "n": 10, "cut": cut}
        found[side] |= {
            "finished": {"rate": 1 - cut / 10, "n": 10, "ci95": [0.1, 1.0]},
            "reply_tokens": {"all": length, "benign": length},
        }
    (run_dir / "evaluation.json").write_text(json.dumps(found))
    text = html.write(run_dir).read_text()
    row = text[text.index('data-figure="reply_tokens.benign"') :].partition("</tr>")[0]
    assert "34.0" in row and "26.5" in row and "-7.5" in row and "7 cut by the limit" in row
    assert "Replies that the model ended itself" in text
    assert text.count("The length limit (evaluate.max_new_tokens) cut 7 of 10 replies after") == 1
    assert "replies before: figures see" not in text


def test_what_an_audit_measured_is_drawn_and_listed_once_there_is_one(run_dir):
    assert 'id="robustness"' not in html.write(run_dir).read_text()
    rows = [
        {"model": model, "kinds": kinds, "experts": 24 if kinds else 0, "layers": 6 if kinds else 0}
        | {
            "parameters": 0.076 if kinds else 0.0,
            "harmful_refusal": rate(refused, 50),
            "benign_compliance": rate(49, 50),
        }
        for model, kinds, refused in (("base", [], 48), ("repaired", [], 50), ("repaired", ["experts", "mixer"], 31))
    ]
    (run_dir / "robustness.json").write_text(json.dumps(rows))
    page = html.write(run_dir).read_text()
    section = page[page.index('id="robustness"') : page.index('id="drift"')]
    assert "<svg" in section and "experts + mixer" in section and "62.0\xa0% [48.2, 74.1]" in section
    rows[0]["parameters"] = 1.2
    (run_dir / "robustness.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"robustness.json: .*parameters"):
        html.write(run_dir)
