"""The report: data never becomes markup, holes are explained, and the page works in a browser."""

import html
import json
import math
import re
import shutil
import subprocess

import pytest

from tools import report

EVIL = "</script><img src=x onerror=alert(1)>"
STRANGE = [EVIL, "<b>", "\"'`${}", "\n", "\0", "\ud800", "\U0001f600", "\u202eevil",
           "\u05e9\u05dc\u05d5\u05dd", "\u2028", "", " ", "\t", "&amp;", "<!--", "DATA", "x" * 300]
KEYS = ("log", "losses", "splits", "health", "one_by_one", "usage", "sentences", "concepts",
        "similarity", "importance")
CHROMIUM = shutil.which("chromium")
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")


def bare(**more):
    """The keys that a report cannot do without."""
    return dict(title="run", arch="concept", step=20, tokens=2000, params=12345,
                settings={"n_layer": 2, "note": ""}, unigram_entropy=5.5, **more)


def sample(C=4, T=6, words=("The", " cat", " sees", " the", " river", ".")):
    """A whole report: C concepts; concept c puts 0.5 on token c, the rest is even."""
    sentence = dict(tokens=list(words[:T]), masked=[t == 1 for t in range(T)],
                    guess=[" dog" if t == 1 else None for t in range(T)],
                    weights=[[0.5 if t == c % T else 0.5 / max(T - 1, 1) for t in range(T)]
                             for c in range(C)])
    second = dict(sentence, tokens=[f" other{t}" for t in range(T)])
    log = [dict(step=s, tokens=100 * s, loss=9 - s / 4) for s in range(20)]
    log += [dict(step=s, tokens=100 * s, val_loss=8 - s / 4, concept_rank=1 + s / 9,
                 duplicates=None, shuffled=0.1) for s in (5, 10, 20)]
    log[-1] |= dict(importance_rank_correlation=0.5, frequency_rank_correlation=0.25)
    quantiles = [None if t == 0 else t / T for t in range(T)]
    importance = dict(
        kind="model", rows=8, importance_rank_correlation=0.5, frequency_rank_correlation=0.25,
        importance_quantiles=list(range(11)), histogram=dict(low=0.0, high=9.0, counts=[2, 0, 5]),
        row=dict(tokens=list(words[:T]), scores=[float(t) for t in range(T)], quantiles=quantiles),
        words=[[word, 2.0 + t, 9.0 - t, 3] for t, word in enumerate(words[:T])],
        importance_examples=dict(easy=[words[0]], medium=[], hard=[words[1], words[2]]))
    masking = dict(loss=3.25, accuracy=0.5, perplexity=25.8, bits_per_byte=1.1, predicted=4096)
    health = dict(columns=["trained", "untrained"],
                  rows=[["rank", "how many " + words[0], 3.5, None]])
    losses = {words[0]: {"token": masking, "span": masking, "unigram_entropy": 5.4}}
    return bare(log=log, losses=losses, health=health,
                splits={words[0]: dict(loss=None, share=0.25), "new": dict(loss=4.0, share=0.75)},
                one_by_one=[0.1] * C, usage=[1 / C] * C, sentences=[sentence, second],
                importance=importance,
                concepts=[[[words[c % T], 2.0, 12], [" also", 1.0, 7]] for c in range(C)],
                similarity=[[1.0 if a == b else -0.25 for b in range(C)] for a in range(C)])


def embedded(page):
    """The data that a page carries, as a browser would parse it."""
    script = r'<script id="data" type="application/json">(.*?)</script>'
    return json.loads(re.search(script, page, re.S)[1])


def test_hostile_text_stays_data():
    data = {**sample(words=[EVIL] * 6), "title": "<b>bold</b>" + EVIL}
    page = report.page(data)
    assert "<b>bold" not in page and "<img" not in page and "</script><" not in page
    assert page.count("</script") == report.PAGE.count("</script")
    assert embedded(page)["title"] == data["title"]
    assert embedded(page)["sentences"][0]["tokens"] == [EVIL] * 6
    assert embedded(page)["importance"]["row"]["tokens"] == [EVIL] * 6


def test_every_token_survives_and_the_file_is_ascii():
    page = report.page({**bare(), "sentences": [dict(tokens=STRANGE)]})
    assert page.isascii() and embedded(page)["sentences"][0]["tokens"] == STRANGE


def test_nothing_is_loaded_and_the_policy_says_so():
    page = report.page(sample())
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in page
    assert not re.search(r"\b(src|href)=|url\(|@import|innerHTML|outerHTML|insertAdjacent|"
                         r"document\.write|eval\(", page)


def test_nan_and_infinity_become_holes():
    log = [dict(step=1, tokens=9, loss=math.nan), dict(step=2, tokens=18, loss=3.0)]
    page = embedded(report.page(bare(one_by_one=[math.nan, math.inf, 0.5], log=log)))
    assert page["one_by_one"] == [None, None, 0.5] and page["log"]["loss"] == [[18, 3.0]]


def test_curves_are_averaged_not_cut():
    log = [dict(step=s, tokens=s, loss=float(s % 2)) for s in range(10 * report.POINTS)]
    points = report.curves(log)["loss"]
    assert len(points) == report.POINTS and {value for _, value in points} == {0.5}


def test_a_failed_report_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.html"
    report.write_report(path, sample())
    before = path.read_bytes()
    assert before.decode() == report.page(sample())
    with pytest.raises(TypeError):
        report.write_report(path, bare(usage=object()))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["report.html"]


# ---- in a browser ------------------------------------------------------------

HELP = """<script>
const out = [], say = (...words) => out.push(words.join(" "));
addEventListener("error", event => say("ERROR", event.message));
addEventListener("securitypolicyviolation", event => say("POLICY", event.violatedDirective));
window.alert = () => say("ALERT");
const text = css => document.querySelector(css).textContent;
const all = css => [...document.querySelectorAll(css)];
function hover(css, r, c) {
  const canvas = document.querySelector(css);
  const {left, top, width, height} = canvas.getBoundingClientRect();
  canvas.dispatchEvent(new PointerEvent("pointermove", {bubbles: true,
    clientX: left + (c + 0.5) * width / canvas.width,
    clientY: top + (r + 0.5) * height / canvas.height}));
  return text("#tip");
}
</script>"""
DONE = """<script>
say("sideways", document.documentElement.scrollWidth > innerWidth ? "yes" : "no", innerWidth);
const pixels = c => c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
say("painted", all("canvas").every(c => pixels(c).some(v => v)));
document.body.innerHTML = "<pre id=out></pre>";
document.getElementById("out").textContent = JSON.stringify(out);
</script>"""


def visit(tmp_path, data, script="", width=1280):
    """Opens the page of `data` in Chromium and runs `script` -> {first word: rest} of each say().

    Fails on an error of the script, a violation of the page's policy, or sideways scrolling.
    """
    page = report.page(data).replace("<style>", HELP + "<style>", 1)
    page += f"<script>{script}</script>{DONE}"
    if width < 500:  # a window cannot be that small, a frame can
        frame = page.replace("&", "&amp;").replace('"', "&quot;")
        style = f"width: {width}px; height: 800px; border: 0"
        page = f"""<iframe style="{style}" srcdoc="{frame}"></iframe><script>
            const frame = document.querySelector("iframe");
            const result = () => frame.contentDocument.getElementById("out");
            frame.onload = () => document.body.append(result());</script>"""
    (tmp_path / "page.html").write_text(page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--enable-logging=stderr",
             "--window-size=1280,900", "--virtual-time-budget=3000",
             f"--user-data-dir={tmp_path}/profile"]
    done = subprocess.run([CHROMIUM, *flags, f"file://{tmp_path}/page.html"], capture_output=True,
                          text=True, timeout=60)
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    said = json.loads(html.unescape(found[1]))
    said += re.findall(r"CONSOLE.*", done.stderr)
    bad = [line for line in said if line.startswith(("ERROR", "POLICY", "CONSOLE", "ALERT"))]
    assert not bad and "painted true" in said and f"sideways no {width}" in said, said
    return dict(line.split(" ", 1) for line in said)


@browser
def test_hover_keys_and_choice_of_a_sentence(tmp_path):
    said = visit(tmp_path, sample(), """
        say("1", hover("#attention canvas", 2, 1));
        say("words", all(".sentence .on").map(e => e.textContent));
        say("2", hover("#attention canvas", 1, 1)); say("3", hover("#similarity canvas", 0, 3));
        const canvas = document.querySelector("#attention canvas");
        canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown"}));
        say("4", text("#tip"));
        canvas.dispatchEvent(new PointerEvent("pointerleave"));
        say("gone", document.getElementById("tip").hidden);
        get("sentence").value = "1"; get("sentence").dispatchEvent(new Event("change"));
        say("5", hover("#attention canvas", 3, 3)); say("label", text(".columns"));
        get("filter").value = "SEES"; get("filter").dispatchEvent(new Event("input"));
        say("cards", all(".card:not([hidden])").length, all(".card").length);
        const empty = all("section").filter(s => s.children.length < 3);
        say("empty", empty.length, all("th:not([scope])").length);""")
    dot = "\u00b7"
    assert said["1"] == (f"concept 2 reads {dot}cat with 10.0%"
                         f"masked; the model predicts: {dot}dog"
                         f"top tokens: {dot}sees  {dot}also")
    assert said["words"] == "cat" and "with 50.0%" in said["2"]
    assert said["3"] == "concepts 0 and 3: -0.250"
    assert said["4"].startswith(f"concept 2 reads {dot}cat") and said["gone"] == "true"
    assert said["5"].startswith(f"concept 3 reads {dot}other3 with 50.0%")
    assert "other0" in said["label"]
    assert said["cards"] == "1 4" and said["empty"] == "0 0"


POINT = """
    const point = (node, x, y) => {
      const {left, top} = node.getBoundingClientRect();
      node.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: left + x,
        clientY: top + y}));
      return get("tip").innerText.trim().replace(/\\n+/g, "; ");
    };
    const [plot, , bars] = all("#importance svg"), words = all(".scored bdi");"""


@browser
def test_importance_tells_scores_of_tokens_and_ids(tmp_path):
    said = visit(tmp_path, sample(), POINT + """
        say("row", text(".scored")); say("special", point(words[0], 1, 1));
        say("tip", point(words[3], 1, 1)); say("colour", words.map(w => w.style.background).join());
        say("first", point(plot, plot.clientWidth, 0)); say("last", point(plot, 0, 400));
        say("labels", [...plot.querySelectorAll(".label")].map(e => e.textContent).sort().join());
        say("bars", bars.querySelector(".bars").getAttribute("d").split("M").length - 1);
        say("gone", plot.onpointerleave() || get("tip").hidden);
        say("text", get("importance").innerText.replace(/\\s+/g, " "));""")
    assert said["row"] == "The cat sees the river."
    assert said["special"] == "The; a special token, never hidden"
    assert said["tip"] == "\u00b7the; score 3.000, higher than 50.0% of the row"
    shares = [float(share) for share in re.findall(r"accent\) ([\d.]+)%", said["colour"])]
    assert shares == pytest.approx([65 * t / 6 for t in range(6)], abs=0.01)
    assert said["first"] == "The; mean score 9.000; -log frequency 2.000; 3 times in these rows"
    assert said["last"].startswith(".; mean score 4.000; -log frequency 7.000")
    assert said["labels"] == ".,The,cat,river,sees,the" and said["bars"] == "3"
    assert said["gone"] == "true"
    for part in ("scores model rows 8", "rank correlation with the loss 0.500",
                 "the same of -log frequency 0.250", "a tenth is below 1, half below 5, a tenth "
                 "above 9", "easy The medium hard \u00b7cat \u00b7sees"):
        assert part in said["text"], part


@browser
def test_importance_of_the_same_score_and_frequency_everywhere_is_drawn(tmp_path):
    """A dot on a dot, a histogram without width, an evaluation without numbers, an odd text."""
    importance = dict(kind="ema", rows=1, histogram=dict(low=2.0, high=2.0, counts=[0, 7]),
                      words=[[text, 2.0, 2.0, 1] for text in STRANGE],
                      row=dict(tokens=STRANGE, scores=[2.0] * len(STRANGE),
                               quantiles=[0.5] * len(STRANGE)))
    said = visit(tmp_path, bare(importance=importance), POINT + """
        say("made", all("#importance img, #importance bdi *, svg b").length);
        say("tip", point(words[0], 1, 1)); say("label", text("#importance .label"));
        say("paths", all("#importance path").map(p => p.getAttribute("d")).join(" "));
        say("text", get("importance").innerText.replace(/\\s+/g, " "));""", width=400)
    assert said["made"] == "0" and said["tip"].startswith(EVIL)
    assert said["label"] == EVIL[:18]
    assert "NaN" not in said["paths"] and "undefined" not in said["text"]
    assert "rank correlation with the loss \u2013" in said["text"]
    assert "The log holds none after the first step." in said["text"]


@browser
def test_hostile_text_is_shown_not_run_on_a_narrow_screen(tmp_path):
    data = {**sample(C=3, T=len(STRANGE), words=STRANGE), "title": "<b>run</b>" + EVIL,
            "settings": {EVIL: EVIL}}
    said = visit(tmp_path, data, """
        say("title", text("h1")); say("made", all("img, h1 b, .sentence b").length);
        say("shown", all(".sentence bdi").map(e => e.textContent).join("|"));
        hover("#attention canvas", 0, 0);
        say("tip", text("#tip")); for (const d of all("details")) d.open = true;""", width=400)
    assert said["title"] == data["title"] and said["made"] == "0" and EVIL in said["tip"]
    shown = said["shown"].split("|")
    assert shown[0] == EVIL and shown[3:5] == ["\u23ce", "\u2400"]
    assert shown[10] == "\u2205" and shown[12] == "\u21e5"


@browser
@pytest.mark.parametrize("data, expected", [
    (bare(), ["The log holds no losses.", "No sentence has been read.",
              "The concepts have not been compared.", "Words have no scores here"]),
    ({**bare(**dict.fromkeys(KEYS)), "arch": "transformer", "settings": {},
      "log": [dict(step=1, tokens=5, loss=9.0)]},
     ["The log holds no evaluations.", "This model is a Transformer: it has no concepts."]),
    (sample(C=1, T=3), ["concept 0"])], ids=["bare", "transformer", "one concept"])
def test_holes_are_explained(tmp_path, data, expected):
    shown = visit(tmp_path, data, "say('shown', text('body > main'));")["shown"]
    for sentence in expected:
        assert sentence in shown
    assert "undefined" not in shown and "NaN" not in shown
