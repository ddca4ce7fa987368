"""One HTML page that shows what a trained model does: curves, losses, health, what each concept reads.

write_report(path, data) turns plain data (dicts, lists, numbers, text) into a file that needs nothing else: no network,
no font, no library. The data never becomes markup: it travels as JSON, and the script puts it into the page as text.
Where an optional key of `data` is missing or empty, one sentence says why there is nothing to see.
"""

import json
import math

from lib.files import replace_file

SERIES = ("loss", "val_loss", "concept_rank", "input_dependence", "duplicates", "shuffled", "zeroed")
POINTS = 600  # of a curve; a longer one is averaged down to this, or the page would grow with the run


def write_report(path, data):
    """Replaces `path` by the page of `data`, whole or not at all."""
    replace_file(path, lambda file: file.write(page(data).encode()))


def page(data):
    """data -> HTML. title, arch, step, tokens, params, settings, unigram_entropy are needed, all else is optional."""
    text = json.dumps(clean({**data, "log": curves(data.get("log") or [])}), allow_nan=False)
    text = text.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&"})  # beyond ASCII, json.dumps has done the same
    return PAGE.replace("DATA", text, 1)


def clean(value):
    """What JSON can hold: NaN and infinity become None, floats keep 6 digits (the weights are most of the page)."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def curves(log):
    """Records of a training log -> {name: [[tokens, value], ...]} of at most POINTS points each."""
    result = {}
    for key in SERIES:
        points = sorted((r["tokens"], r[key]) for r in log if r.get(key) is not None and math.isfinite(r[key]))
        n = max(1, math.ceil(len(points) / POINTS))
        groups = [points[i:i + n] for i in range(0, len(points), n)]
        result[key] = [[sum(column) / len(group) for column in zip(*group)] for group in groups]
    return result


# ---- the page: style, words, script ------------------------------------------

PAGE = r"""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"><meta name="viewport"
content="width=device-width, initial-scale=1"><title>report</title><style>
:root { color-scheme: light dark; --paper: #fcfbf8; --card: #fff; --ink: #1f2024; --soft: #686971; --rule: #e3e1da;
  --accent: #3143b0; --warm: #b0492c; }
@media (prefers-color-scheme: dark) { :root { --paper: #16171b; --card: #1e1f25; --ink: #e7e5df; --soft: #9c9ca5;
  --rule: #313239; --accent: #a8b4ff; --warm: #f0957a; } }
body { margin: 0 auto; max-width: 1180px; padding: clamp(2rem, 5vw, 4rem) clamp(1rem, 3vw, 2rem) 6rem;
  color: var(--ink); background: var(--paper); font: 15px/1.55 system-ui, sans-serif; overflow-wrap: break-word;
  font-variant-numeric: tabular-nums; } * { box-sizing: border-box; }
h1, h2 { font: 500 2.3rem/1.2 ui-serif, Charter, Georgia, serif; margin: 0; } h2 { font-size: 1.5rem; }
h3 { font-size: .95rem; margin: 0; display: flex; justify-content: space-between; } small { display: block; }
section { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: 1.5rem; }
p { margin: .5rem 0 1.5rem; max-width: 72ch; } p, small, caption, thead, dt, .legend { color: var(--soft); }
small, thead, dt, .legend { font-size: .85rem; } dl, nav, .legend { display: flex; flex-wrap: wrap; gap: .4rem 2rem; }
dl { margin: 1.5rem 0; } dd { margin: 0; font-size: 1.25rem; } a { color: var(--accent); text-decoration: none; }
.scroll { overflow-x: auto; } .scroll + .scroll { margin-top: 2rem; } table { border-collapse: collapse; width: 100%; }
th, td { padding: .42rem 0 .42rem 1.2rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap;
  font-weight: 400; vertical-align: baseline; } caption { text-align: left; } #splits td { width: 1%; }
th:first-child { padding-left: 0; text-align: left; white-space: normal; min-width: 10rem; }
td:nth-child(2), .minis b { color: var(--accent); font-weight: 600; } #splits td:last-child { text-align: left; }
i { display: inline-block; height: .4rem; border-radius: 2px; background: var(--accent); }
.minis, .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 2rem; }
.minis { margin-top: 2rem; } svg { display: block; width: 100%; } svg * { pointer-events: none; }
text { font-size: 11px; fill: var(--soft); } line { stroke: var(--rule); }
path { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.pale { stroke: var(--soft); stroke-width: 1; opacity: .6; } .dashed { stroke: var(--warm); stroke-dasharray: 5 4; }
select, input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--rule); max-width: 90%;
  border-radius: 6px; padding: .35rem .6rem; margin: 0 0 1.2rem .5rem; }
.sentence { color: var(--ink); line-height: 2.4; max-width: none; overflow: auto; } .on { outline: 1px solid; }
bdi { white-space: pre-wrap; } rt { font-size: .74rem; } ruby { overflow-wrap: normal; }
ruby bdi { text-decoration: underline dotted; } .masked { color: var(--accent); } .wrong { color: var(--warm); }
.matrix { display: grid; grid-template: auto auto / 2.4rem max-content; width: max-content; font-size: 10px; }
.axis { position: relative; color: var(--soft); } .axis span { position: absolute; line-height: 1; white-space: pre; }
.rows { position: sticky; left: 0; z-index: 2; background: var(--paper); } .rows span { right: 6px; translate: 0 -50%; }
.columns span { writing-mode: vertical-rl; bottom: 6px; translate: -50%; rotate: 180deg; max-height: 6.6rem;
  overflow: hidden; text-overflow: ellipsis; unicode-bidi: isolate; } .columns { height: 7rem; }
.plot { position: relative; overflow: hidden; border: 1px solid var(--rule); --x: -99px; --y: -99px; }
.plot::before, .plot::after { content: ""; position: absolute; pointer-events: none; outline: 1px solid var(--soft); }
.plot::before { inset: var(--y) 0 auto; height: var(--h); } .plot::after { inset: 0 auto 0 var(--x); width: var(--w); }
canvas { display: block; image-rendering: pixelated; cursor: crosshair; } #similarity .columns { height: 2rem; }
.legend { margin: .8rem 0; gap: .8rem; align-items: center; } .legend i { flex: 0 10rem; }
#tip, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .8rem; }
#tip { position: fixed; max-width: min(24rem, 92vw); z-index: 9; pointer-events: none; box-shadow: 0 6px 24px #0003; }
.cards { gap: 1rem; max-height: 48rem; overflow: auto; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); }
.word { display: grid; grid-template-columns: 1fr 4rem; align-items: center; } .word bdi { overflow: hidden; }
</style>
<noscript>This page draws itself: please allow its script. It loads nothing and sends nothing.</noscript>
<header><h1></h1><dl></dl><nav aria-label="sections"></nav></header><main>
<section id="curves" data-empty="The log holds no losses."><h2>Curves</h2><p>Nats a predicted token, in
<span class="pale">training</span> and in <span class="masked">validation</span>. Word frequencies alone reach the
dashed line; below it, the model uses context.</p></section>
<section id="losses" data-empty="No held-out text has been measured."><h2>Losses</h2><p>In nats, on fixed masks: every
model is asked the same questions. Bits per byte are the cost of the hidden text, given the rest.</p></section>
<section id="splits" data-empty="The loss has not been split."><h2>Where the loss is</h2><p>Predicted tokens by kind:
the loss on that kind, and its share of all predicted tokens.</p></section>
<section id="health" class="ours" data-empty="The concepts have not been measured."><h2>Health</h2><p>The trained model
beside its controls: where a number does not differ from theirs, it says nothing.</p></section>
<section id="attention" class="ours" data-empty="No sentence has been read."><h2>What the concepts read</h2><p>A row is
a concept, a column a token: the stronger the colour, the more of its attention goes there. Point at a cell (or
use the arrow keys): the sentence shows all that the concept reads. Hidden tokens carry the model's guess.</p></section>
<section id="concepts" class="ours" data-empty="No words have been counted."><h2>Concepts</h2><p>What each concept reads
more than frequency explains (bar: pointwise mutual information), the words it owns left aside; its use: share of
the decoder's attention; its loss: nats lost when it alone is zeroed.</p></section>
<section id="similarity" class="ours" data-empty="The concepts have not been compared."><h2>Similarity</h2><p>Cosine of
pairs of concepts, their mean taken away. Pale is healthy; blocks off the diagonal repeat themselves.</p></section>
<section id="settings" data-empty="None recorded."><h2>Settings</h2><p>What the model was trained with.</p></section>
</main><div id="tip" role="status" hidden></div>
<script id="data" type="application/json">DATA</script>
<script>"use strict";
const get = id => document.getElementById(id), range = n => [...Array(n).keys()];
const data = JSON.parse(get("data").textContent), log = data.log, painters = {};  // by name, to draw again on resize

// ---- elements, text, numbers: el() is the only way into the page, and what it is given as a string stays text
function el(name, attributes, ...children) {
  const svg = ["svg", "path", "line", "text"].includes(name);
  const node = document.createElementNS(`http://www.w3.org/${svg ? "2000/svg" : "1999/xhtml"}`, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children.flat(9).filter(child => child != null && child !== false));
  return node;
}
function show(text) {  // the unseen gets a sign: spaces at the ends, line ends, control and format characters, nothing
  if (/^\p{Cf}*$/u.test(text)) return [...text].map(c => "U+" + c.codePointAt().toString(16)).join(" ") || "\u2205";
  return text.replace(/\r?\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(/^\s+|\s+$/g, s => "\u00b7".repeat(s.length))
    .replace(/[\0-\x1f]/g, c => String.fromCharCode(0x2400 + c.charCodeAt()));
}
const prose = text => show(text).replace(/^\u00b7+|\u00b7+$/g, dots => " ".repeat(dots.length));
const token = text => el("bdi", {}, show(text));
const format = (x, how) => x == null ? "\u2013" : x.toLocaleString("en", how);
const compact = x => format(x, {notation: "compact", maximumSignificantDigits: 3});
const percent = x => format(x, {style: "percent", minimumSignificantDigits: 3, maximumSignificantDigits: 3});
const number = x => x && Math.abs(x) < 0.0005 ? x.toExponential(1) : format(x, {minimumFractionDigits: 3});
const signed = x => (x > 0 ? "+" : "") + number(x);

function fill(id, value, draw) {  // a section, or the reason why it is empty
  const section = get(id), [title, text] = section.children, some = value && Object.keys(value).length;
  document.querySelector("nav").append(el("a", {href: "#" + id}, title.textContent));
  if (some) section.append(el("div", {}, draw(value)));
  else text.textContent = section.className && data.arch === "transformer" ?
    "This model is a Transformer: it has no concepts." : section.dataset.empty;
}
const scroll = (label, child) => el("div", {class: "scroll", role: "region", "aria-label": label, tabindex: 0}, child);
function table(label, head, rows, caption) {  // the first cell of a row is its heading
  return scroll(label, el("table", {}, caption && el("caption", {}, caption),
    el("thead", {}, el("tr", {}, head.map(text => el("th", {scope: "col"}, text)))), rows.map(([first, ...cells]) =>
      el("tr", {}, el("th", {scope: "row"}, first), cells.map(cell => el("td", {}, cell))))));
}
function tip(x, y, ...lines) {  // no lines: away with it
  const box = get("tip");
  box.replaceChildren(...lines.map(line => el("div", {}, line)));
  box.hidden = !lines.length;
  box.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.offsetWidth - 4)) + "px";
  box.style.top = y + (y + 14 + box.offsetHeight > innerHeight ? -14 - box.offsetHeight : 14) + "px";
}

// ---- curves
function ticks(low, high, n) {  // about n round numbers
  const power = 10 ** Math.floor(Math.log10((high - low) / n));
  const step = power * [1, 2, 5, 10].find(f => f * power * n >= (high - low) * 0.999), first = Math.ceil(low / step);
  return range(Math.floor(high / step) - first + 1).map(i => Number(((first + i) * step).toPrecision(9)));
}
function chart(label, height, low, high, lines, entropy) {  // lines: [name, class, [[tokens, value], ...]]
  const box = el("div", {}), end = Math.max(1, ...lines.flatMap(line => line[2].map(point => point[0])));
  painters[label] = () => {
    const width = Math.max(box.clientWidth, 150), left = 42, right = width - 16, bottom = height - 24;
    const x = t => left + t / end * (right - left), y = v => bottom - (v - low) / (high - low) * (bottom - 8);
    const across = (v, kind) => el("line", {class: kind, x1: left, x2: right, y1: y(v), y2: y(v)});
    const write = (text, x, y, anchor) => el("text", {x, y, "text-anchor": anchor}, text);
    const svg = el("svg", {role: "img", "aria-label": label, height},
      ticks(low, high, height / 45).map(v => [across(v, ""), write(v, left - 8, y(v) + 4, "end")]),
      ticks(0, end, width / 110).map(t => write(compact(t), x(t), height - 4, "middle")),
      entropy && [across(entropy, "dashed"), write("unigram entropy " + number(entropy), right, y(entropy) - 6, "end")],
      lines.map(([, kind, points]) => el("path", {class: kind,  // h0 makes a lone point visible
        d: "M" + points.map(([t, v]) => [x(t), y(v)]).join("L") + "h0"})));
    svg.onpointermove = e => tip(e.clientX, e.clientY, ...lines.map(([name, , points]) => {
      const [t, v] = points.reduce((a, b) => Math.abs(x(b[0]) - e.offsetX) < Math.abs(x(a[0]) - e.offsetX) ? b : a);
      return `${name} ${number(v)} at ${compact(t)} tokens`;
    }));
    svg.onpointerleave = () => tip();
    box.replaceChildren(svg);
  };
  return box;
}

// ---- heat maps: a canvas with one pixel a cell, enlarged by CSS: sharp on every screen, small even for 512 x 512
// shade(r, c): -1..1; point(r, c): lines of the tip; name(c), kind(c): text and class of a column; leave(): all over
function matrix({id, label, rows, columns, shade, point, name, kind, leave = () => {}}) {
  const canvas = el("canvas", {width: columns, height: rows, role: "img", tabindex: 0, "aria-label": label});
  const [side, head] = ["rows", "columns"].map(kind => el("div", {class: "axis " + kind, "aria-hidden": true}));
  const plot = el("div", {class: "plot"}, canvas);
  const box = scroll(label, el("div", {class: "matrix"}, el("div", {}), head, side, plot));
  let w, h, at = [0, 0];
  function axis(node, n, cell, edge, name = String, kind = () => "") {  // as many labels as there is room for
    const every = 2 ** Math.max(0, Math.ceil(Math.log2(11 / cell)));
    node.replaceChildren(...range(n).filter(i => i % every === 0).map(i =>
      el("span", {class: kind(i), style: `${edge}: ${(i + 0.5) * cell}px`}, name(i))));
  }
  painters[id] = () => {
    const image = new ImageData(columns, rows), style = getComputedStyle(document.body);
    const [less, more] = ["--warm", "--accent"].map(key =>
      style.getPropertyValue(key).match(/\w\w/g).map(hex => parseInt(hex, 16)));
    for (const r of range(rows)) for (const c of range(columns))
      image.data.set([...(shade(r, c) < 0 ? less : more), 255 * Math.abs(shade(r, c))], 4 * (r * columns + c));
    canvas.getContext("2d").putImageData(image, 0, 0);
    h = Math.max(3, Math.min(24, Math.floor(580 / rows)));
    w = name ? Math.max(11, Math.min(24, (box.clientWidth - 44) / columns)) : h;
    canvas.style = `width: ${w * columns}px; height: ${h * rows}px`;
    axis(side, rows, h, "top");
    axis(head, columns, w, "left", name, kind);
  };
  function go(r, c) {  // to the cell, or the nearest there is
    at = [r, c] = [Math.min(rows - 1, Math.max(0, r)), Math.min(columns - 1, Math.max(0, c))];
    plot.style = `--x: ${c * w}px; --y: ${r * h}px; --w: ${w}px; --h: ${h}px`;
    const {left, top} = canvas.getBoundingClientRect();
    tip(left + (c + 1) * w, top + (r + 1) * h, ...point(r, c));
  }
  canvas.onpointermove = canvas.onpointerdown = e => go(Math.floor(e.offsetY / h), Math.floor(e.offsetX / w));
  canvas.onkeydown = event => {
    const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    if (step) { event.preventDefault(); go(at[0] + step[0], at[1] + step[1]); }
  };
  canvas.onpointerleave = canvas.onblur = () => { plot.style = ""; tip(); leave(); };
  return box;
}
const legend = (low, high, what, colours) => el("div", {class: "legend"}, low,
  el("i", {style: `background: linear-gradient(90deg, ${colours})`}), `${high} ${what}`);

// ---- the sections, from top to bottom
document.title = document.querySelector("h1").textContent = show(data.title);
document.querySelector("dl").append(...Object.entries({architecture: data.arch, parameters: compact(data.params),
  "tokens seen": compact(data.tokens), step: format(data.step), "unigram entropy": number(data.unigram_entropy)}).map(
  ([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
const HEALTH = {
  concept_rank: ["effective rank", "How many directions the concepts of a row span; near 1, all are one vector."],
  input_dependence: ["input dependence", "Share of their variance the input causes; near 0, concepts are constants."],
  duplicates: ["duplicates", "Share of the pairs of concepts that are nearly one vector; 0 is best."],
  shuffled: ["loss rise, shuffled", "Nats lost with another row's concepts; near 0, the decoder ignores them."],
  zeroed: ["loss rise, zeroed", "Nats lost with no concepts at all; near 0, the decoder does without."]};
fill("curves", [...log.loss, ...log.val_loss].map(point => point[1]).sort((a, b) => a - b), values => {
  const entropy = data.unigram_entropy, low = Math.min(entropy, values[0]);
  const room = Math.max(entropy, values[Math.floor(values.length * 0.97)]) - low || 1;  // a steep start is cut off
  const lines = [["training", "pale", log.loss], ["validation", "", log.val_loss]].filter(line => line[2].length);
  const small = Object.entries(HEALTH).filter(([key]) => log[key].length).map(([key, [title, how]]) => {
    const values = log[key].map(p => p[1]), low = Math.min(0, ...values), high = Math.max(low + 0.01, ...values);
    return el("div", {}, el("h3", {}, title, el("b", {}, number(values.at(-1)))),
      chart(title, 130, low, high * 1.05 - low * 0.05, [[title, "", log[key]]]), el("small", {}, how));
  });
  return [chart("loss against tokens seen", 340, low - room / 20, low + room * 1.08, lines, entropy),
    el("div", {class: "minis"}, small.length ? small :
      el("p", {}, log.val_loss.length ? "The log follows no concepts." : "The log holds no evaluations."))];
});

fill("losses", data.losses, sets => Object.entries(sets).map(([name, {unigram_entropy, ...results}]) =>
  table("losses on " + name, ["masking", "loss", "accuracy", "perplexity", "bits per byte", "predicted"],
    Object.entries(results).map(([masking, r]) => [token(masking), number(r.loss), percent(r.accuracy),
      number(r.perplexity), number(r.bits_per_byte), format(r.predicted)]),
    [token(name), unigram_entropy && `, unigram entropy ${number(unigram_entropy)} nats`])));
fill("splits", data.splits, kinds => table("loss by kind", ["kind", "loss", "share", ""], Object.entries(kinds).map(
  ([name, {loss, share}]) => [token(name), number(loss), percent(share), el("i", {style: `width: ${14 * share}em`})])));
fill("health", data.health?.rows, rows => table("health", ["", ...data.health.columns], rows.map(
  ([name, how, ...values]) => [[name, el("small", {}, how)], ...values.map(number)])));

const [tops, usage, rises] = ["concepts", "usage", "one_by_one"].map(key => data[key] || []);
fill("attention", data.sentences?.[0]?.weights, () => {
  const box = el("div", {}), select = el("select", {id: "sentence"}, data.sentences.map(({tokens}, i) =>
    el("option", {value: i}, `${i + 1}. ${tokens.map(prose).join("").slice(0, 60)}`)));
  select.onchange = () => {
    const {tokens, masked, guess, weights} = data.sentences[select.value], right = t => guess[t] === tokens[t];
    const top = Math.max(...weights.map(row => Math.max(...row))), shade = (c, t) => Math.sqrt(weights[c][t] / top);
    const kind = t => !masked[t] ? "" : right(t) ? "masked" : "masked wrong";
    const guessed = t => right(t) ? "\u2713" : show(guess[t] || "?");
    const words = tokens.map((text, t) => el("bdi", {class: kind(t)},
      masked[t] ? prose(text).trim() || show(text) : prose(text)));
    const leave = (c, at) => words.forEach((word, t) => {  // the sentence as concept c reads it, or as it is
      word.className = kind(t) + (t === at ? " on" : "");
      word.style.background = `color-mix(in srgb, var(--accent) ${c == null ? 0 : 55 * shade(c, t)}%, transparent)`;
    });
    const point = (c, t) => {
      leave(c, t);
      return [[el("b", {}, "concept " + c), " reads ", token(tokens[t]), " with " + percent(weights[c][t])],
        masked[t] && ["hidden; the model's guess: ", guessed(t)],
        el("small", {}, (tops[c] || []).slice(0, 6).map(([text], i) => [i ? "  " : "top tokens: ", token(text)]))];
    };
    box.replaceChildren(el("p", {class: "sentence"}, words.map((word, t) => masked[t] ? [/^ \S/.test(tokens[t]) && " ",
      el("ruby", {}, word, el("rt", {class: kind(t)}, guessed(t)))] : word)), matrix({id: "attention-map", shade, point,
      label: "attention of concepts (rows) over tokens (columns)", rows: weights.length, columns: tokens.length, kind,
      leave, name: t => show(tokens[t]) + (masked[t] && !right(t) ? " \u2192 " + guessed(t) : "")}),
      legend("0", percent(top), "of a concept's attention; square root scale", "transparent, var(--accent)"));
    painters["attention-map"]();
  };
  select.onchange();
  return [el("label", {for: "sentence"}, "sentence"), select, box];
});

fill("concepts", range(Math.max(tops.length, usage.length, rises.length)), numbers => {
  const most = Math.max(...tops.flat().map(([, pmi]) => pmi)), input = el("input", {id: "filter", type: "search"});
  const cards = numbers.map(c => el("article", {class: "card"}, el("h3", {}, "concept " + c),
    el("small", {}, [usage.length > 0 && "use " + percent(usage[c]), rises.length > 0 && "loss " + signed(rises[c])]
      .filter(Boolean).join(", ")),
    (tops[c] || []).map(([text, pmi, seen]) => el("div", {class: "word", title: `PMI ${number(pmi)}, seen ${seen}x`},
      token(text), el("i", {style: `width: ${100 * Math.max(0, pmi) / most}%`})))));
  input.oninput = () => cards.forEach(c => c.hidden = !c.textContent.toLowerCase().includes(input.value.toLowerCase()));
  return [el("label", {for: "filter"}, "filter"), input, el("div", {class: "cards"}, cards)];
});

fill("similarity", data.similarity, cosine => [matrix({id: "similarity-map", label: "cosine of pairs of concepts",
  rows: cosine.length, columns: cosine.length, shade: (a, b) => cosine[a][b],
  point: (a, b) => [`concepts ${a} and ${b}: ${number(cosine[a][b])}`]}),
  legend("-1", "1", "cosine", "var(--warm), transparent, var(--accent)")]);
fill("settings", Object.entries(data.settings), pairs => el("details", {}, el("summary", {}, `all ${pairs.length}`),
  table("settings", ["setting", "value"], pairs.map(pair => pair.map(text => token(String(text)))))));

const paint = () => Object.values(painters).forEach(painter => painter());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
addEventListener("resize", paint);
paint();
</script>
"""
