"""One HTML page that shows a trained model: curves, losses, health, what each concept reads.

write_report(path, data) turns plain data (dicts, lists, numbers, text) into a file that needs
nothing else: no network, no font, no library. Text of the data never becomes markup: it travels as
JSON, and the script puts it into the page as text. A key of `data` that is missing or empty leaves
one sentence in its section, which says why there is nothing to see.
"""

import json
import math

from lib.files import replace_file
from tools.measures import CONCEPTS, LOSSES

# Measures that training logs, drawn as small curves: [name in log.jsonl, heading, how to read it]
CURVES = [[m.curve, m.heading, m.reading] for m in CONCEPTS if m.curve]
POINTS = 600  # most points of a curve; without a limit the page would grow with the run


def write_report(path, data):
    """Replaces the file `path` by the page of `data`, whole or not at all."""
    replace_file(path, lambda file: file.write(page(data).encode()))


def page(data):
    """data -> HTML.

    Needed are title, arch, step, tokens, params, settings and unigram_entropy; other keys are
    optional: see the calls of fill() in the script for what each holds.
    """
    losses = [[m.name, m.heading, m.form] for m in LOSSES]
    data = {**data, "log": curves(data.get("log") or []), "measures": [CURVES, losses]}
    text = json.dumps(clean(data), allow_nan=False)
    # <, > and & could end the script element. json.dumps has escaped all that is not ASCII.
    text = text.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&"})
    return PAGE.replace("DATA", text, 1)


def clean(value):
    """What JSON can hold: NaN and infinity become None.

    Floats keep 6 digits: weights of attention are most of the page.
    """
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def curves(log):
    """Records of a training log -> {name: [[tokens, value], ...]} of at most POINTS points each.

    A longer curve is averaged in groups of neighbouring points.
    """
    result = {}
    for key in ("loss", "val_loss", *(name for name, _, _ in CURVES)):
        points = sorted((record["tokens"], record[key]) for record in log
                        if record.get(key) is not None and math.isfinite(record[key]))
        n = max(1, math.ceil(len(points) / POINTS))
        groups = [points[i:i + n] for i in range(0, len(points), n)]
        result[key] = [[sum(column) / len(group) for column in zip(*group)] for group in groups]
    return result


# ---- the page: style, words, script ------------------------------------------
# The policy in its head forbids loading anything: the page works offline and sends nothing.

PAGE = r"""<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>report</title><style>
:root { color-scheme: light dark; --paper: #fcfbf8; --card: #fff; --ink: #1f2024;
  --soft: #686971; --rule: #e3e1da; --accent: #3143b0; --warm: #b0492c; }
@media (prefers-color-scheme: dark) { :root { --paper: #16171b; --card: #1e1f25; --ink: #e7e5df;
  --soft: #9c9ca5; --rule: #313239; --accent: #a8b4ff; --warm: #f0957a; } }
body { margin: 0 auto; max-width: 1180px; color: var(--ink); background: var(--paper);
  padding: clamp(2rem, 5vw, 4rem) clamp(1rem, 3vw, 2rem) 6rem; overflow-wrap: break-word;
  font: 15px/1.55 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
* { box-sizing: border-box; }
h1, h2 { font: 500 2.3rem/1.2 ui-serif, Charter, Georgia, serif; margin: 0; }
h2 { font-size: 1.5rem; } small { display: block; }
h3 { font-size: .95rem; margin: 0; display: flex; justify-content: space-between; }
section { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: 1.5rem; }
p { margin: .5rem 0 1.5rem; max-width: 72ch; }
p, small, caption, thead, dt, .legend { color: var(--soft); }
small, thead, dt, .legend { font-size: .85rem; }
dl, nav, .legend { display: flex; flex-wrap: wrap; gap: .4rem 2rem; }
dl { margin: 1.5rem 0; } dd { margin: 0; font-size: 1.25rem; }
a { color: var(--accent); text-decoration: none; }
.scroll { overflow-x: auto; } .scroll + .scroll { margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } caption { text-align: left; }
th, td { padding: .42rem 0 .42rem 1.2rem; border-bottom: 1px solid var(--rule); font-weight: 400;
  text-align: right; white-space: nowrap; vertical-align: baseline; }
th:first-child { padding-left: 0; text-align: left; white-space: normal; min-width: 10rem; }
td:nth-child(2), .minis b { color: var(--accent); font-weight: 600; }
#splits td { width: 1%; } #splits td:last-child { text-align: left; }
i { display: inline-block; height: .4rem; border-radius: 2px; background: var(--accent); }
.minis, .cards { display: grid; gap: 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.minis { margin-top: 2rem; } svg { display: block; width: 100%; } svg * { pointer-events: none; }
text { font-size: 11px; fill: var(--soft); } line { stroke: var(--rule); }
path { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round;
  stroke-linecap: round; }
.pale { stroke: var(--soft); stroke-width: 1; opacity: .6; }
.dashed { stroke: var(--warm); stroke-dasharray: 5 4; }
select, input { font: inherit; color: inherit; background: var(--card); max-width: 90%;
  border: 1px solid var(--rule); border-radius: 6px; padding: .35rem .6rem;
  margin: 0 0 1.2rem .5rem; }
.sentence { color: var(--ink); line-height: 2.4; max-width: none; overflow: auto; }
.on { outline: 1px solid; } bdi { white-space: pre-wrap; } rt { font-size: .74rem; }
ruby { overflow-wrap: normal; } ruby bdi { text-decoration: underline dotted; }
.masked { color: var(--accent); } .wrong { color: var(--warm); }
.matrix { display: grid; grid-template: auto auto / 2.4rem max-content; width: max-content;
  font-size: 10px; }
.axis { position: relative; color: var(--soft); }
.axis span { position: absolute; line-height: 1; white-space: pre; }
.rows { position: sticky; left: 0; z-index: 2; background: var(--paper); }
.rows span { right: 6px; translate: 0 -50%; } .columns { height: 7rem; }
.columns span { writing-mode: vertical-rl; bottom: 6px; translate: -50%; rotate: 180deg;
  max-height: 6.6rem; overflow: hidden; text-overflow: ellipsis; unicode-bidi: isolate; }
.plot { position: relative; overflow: hidden; border: 1px solid var(--rule); --x: -99px;
  --y: -99px; }
.plot::before, .plot::after { content: ""; position: absolute; pointer-events: none;
  outline: 1px solid var(--soft); }
.plot::before { inset: var(--y) 0 auto; height: var(--h); }
.plot::after { inset: 0 auto 0 var(--x); width: var(--w); }
canvas { display: block; image-rendering: pixelated; cursor: crosshair; }
#similarity .columns { height: 2rem; } .legend i { flex: 0 10rem; }
.legend { margin: .8rem 0; gap: .8rem; align-items: center; }
#tip, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: .8rem; }
#tip { position: fixed; max-width: min(24rem, 92vw); z-index: 9; pointer-events: none;
  box-shadow: 0 6px 24px #0003; }
.cards { gap: 1rem; max-height: 48rem; overflow: auto;
  grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); }
.word { display: grid; grid-template-columns: 1fr 4rem; align-items: center; }
.word bdi { overflow: hidden; }
</style>
<noscript>A script draws this page: please allow it. It loads nothing and sends nothing.</noscript>
<header><h1></h1><dl></dl><nav aria-label="sections"></nav></header><main>
<section id="curves" data-empty="The log holds no losses."><h2>Curves</h2>
<p>Nats a predicted token, in <span class="pale">training</span> and in
<span class="masked">validation</span>. The dashed line is the unigram entropy, what word
frequencies alone reach; a loss below it means that the model uses context.</p></section>
<section id="losses" data-empty="No held-out text has been measured."><h2>Losses</h2>
<p>In nats, on fixed masks: all models predict the same tokens. Bits per byte are the cost of the
masked text, given the visible text.</p></section>
<section id="splits" data-empty="The loss has not been split."><h2>Where the loss is</h2>
<p>Predicted tokens by kind: the loss on that kind, and its share of all predicted tokens.</p>
</section>
<section id="health" class="ours" data-empty="The concepts have not been measured."><h2>Health</h2>
<p>The trained model beside its controls. A number that does not differ from theirs is not a result
of training.</p></section>
<section id="attention" class="ours" data-empty="No sentence has been read.">
<h2>What the concepts read</h2>
<p>Attention of the last layer. A row is a concept, a column a token: the stronger the colour, the
larger the share of the concept's attention to that token. Point at a cell (or use the arrow keys)
to colour the sentence by the attention of that concept. Masked tokens show the model's
prediction.</p></section>
<section id="concepts" class="ours" data-empty="No words have been counted."><h2>Concepts</h2>
<p>Tokens that each concept reads more than their frequency explains (bar: pointwise mutual
information), in the heads that are not restricted to the words it owns. Use: share of the
decoder's attention. Loss: nats lost when this concept alone is zeroed.</p></section>
<section id="similarity" class="ours" data-empty="The concepts have not been compared.">
<h2>Similarity</h2>
<p>Cosine of pairs of concepts, minus their mean. Pale is healthy; coloured blocks off the diagonal
are concepts that repeat each other.</p></section>
<section id="settings" data-empty="None recorded."><h2>Settings</h2>
<p>What the model was trained with.</p></section>
</main><div id="tip" role="status" hidden></div>
<script id="data" type="application/json">DATA</script>
<script>"use strict";
const get = id => document.getElementById(id), range = n => [...Array(n).keys()];
const data = JSON.parse(get("data").textContent), log = data.log;
const [curveMeasures, lossMeasures] = data.measures;  // of tools/measures.py
const painters = {};  // name: draws a chart or heat map, again when the size changes

// ---- elements, text, numbers
// el() is the only way into the page: what it is given as a string stays text.
function el(name, attributes, ...children) {
  const svg = ["svg", "path", "line", "text"].includes(name);
  const space = svg ? "2000/svg" : "1999/xhtml";
  const node = document.createElementNS(`http://www.w3.org/${space}`, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children.flat(9).filter(child => child != null && child !== false));
  return node;
}
// Signs for what is invisible: spaces at the ends, line ends, control and format characters, "".
function show(text) {
  if (/^\p{Cf}*$/u.test(text))
    return [...text].map(c => "U+" + c.codePointAt().toString(16)).join(" ") || "\u2205";
  return text.replace(/\r?\n/g, "\u23ce").replace(/\t/g, "\u21e5")
    .replace(/^\s+|\s+$/g, spaces => "\u00b7".repeat(spaces.length))
    .replace(/[\0-\x1f]/g, c => String.fromCharCode(0x2400 + c.charCodeAt()));
}
// The same within a sentence, where spaces may stay spaces.
const prose = text => show(text).replace(/^\u00b7+|\u00b7+$/g, dots => " ".repeat(dots.length));
const token = text => el("bdi", {}, show(text));
const format = (x, how) => x == null ? "\u2013" : x.toLocaleString("en", how);
const compact = x => format(x, {notation: "compact", maximumSignificantDigits: 3});
const percent = x =>
  format(x, {style: "percent", minimumSignificantDigits: 3, maximumSignificantDigits: 3});
const number = x =>
  x && Math.abs(x) < 0.0005 ? x.toExponential(1) : format(x, {minimumFractionDigits: 3});
const signed = x => (x > 0 ? "+" : "") + number(x);

function fill(id, value, draw) {  // a section: draw(value), or the reason why it is empty
  const section = get(id), [title, text] = section.children;
  document.querySelector("nav").append(el("a", {href: "#" + id}, title.textContent));
  if (value && Object.keys(value).length) section.append(el("div", {}, draw(value)));
  else if (section.className && data.arch === "transformer")
    text.textContent = "This model is a Transformer: it has no concepts.";
  else text.textContent = section.dataset.empty;
}
const scroll = (label, child) =>
  el("div", {class: "scroll", role: "region", "aria-label": label, tabindex: 0}, child);
function table(label, head, rows, caption) {  // the first cell of a row is its heading
  const line = ([first, ...cells]) => el("tr", {}, el("th", {scope: "row"}, first),
    cells.map(cell => el("td", {}, cell)));
  return scroll(label, el("table", {}, caption && el("caption", {}, caption),
    el("thead", {}, el("tr", {}, head.map(text => el("th", {scope: "col"}, text)))),
    rows.map(line)));
}
function tip(x, y, ...lines) {  // the box beside the pointer; without lines it is hidden
  const box = get("tip");
  box.replaceChildren(...lines.map(line => el("div", {}, line)));
  box.hidden = !lines.length;
  const below = y + 14 + box.offsetHeight <= innerHeight;
  box.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.offsetWidth - 4)) + "px";
  box.style.top = y + (below ? 14 : -14 - box.offsetHeight) + "px";
}

// ---- curves
function ticks(low, high, n) {  // about n round numbers
  const power = 10 ** Math.floor(Math.log10((high - low) / n));
  const step = power * [1, 2, 5, 10].find(f => f * power * n >= (high - low) * 0.999);
  const first = Math.ceil(low / step), count = Math.floor(high / step) - first + 1;
  return range(count).map(i => Number(((first + i) * step).toPrecision(9)));
}
function chart(label, height, low, high, lines, entropy) {  // lines: [name, class, points]
  const box = el("div", {});
  const end = Math.max(1, ...lines.flatMap(line => line[2].map(point => point[0])));
  painters[label] = () => {
    const width = Math.max(box.clientWidth, 150);
    const left = 42, right = width - 16, bottom = height - 24;
    const x = t => left + t / end * (right - left);
    const y = v => bottom - (v - low) / (high - low) * (bottom - 8);
    const across = (v, kind) => el("line", {class: kind, x1: left, x2: right, y1: y(v), y2: y(v)});
    const write = (text, x, y, anchor) => el("text", {x, y, "text-anchor": anchor}, text);
    const path = points =>  // h0 makes a single point visible
      "M" + points.map(([t, v]) => [x(t), y(v)]).join("L") + "h0";
    const svg = el("svg", {role: "img", "aria-label": label, height},
      ticks(low, high, height / 45).map(v =>
        [across(v, ""), write(v, left - 8, y(v) + 4, "end")]),
      ticks(0, end, width / 110).map(t => write(compact(t), x(t), height - 4, "middle")),
      entropy && [across(entropy, "dashed"),
        write("unigram entropy " + number(entropy), right, y(entropy) - 6, "end")],
      lines.map(([, kind, points]) => el("path", {class: kind, d: path(points)})));
    svg.onpointermove = event => {
      const far = point => Math.abs(x(point[0]) - event.offsetX);
      tip(event.clientX, event.clientY, ...lines.map(([name, , points]) => {
        const [t, v] = points.reduce((a, b) => far(b) < far(a) ? b : a);
        return `${name} ${number(v)} at ${compact(t)} tokens`;
      }));
    };
    svg.onpointerleave = () => tip();
    box.replaceChildren(svg);
  };
  return box;
}

// ---- heat maps
// A canvas with one pixel a cell, enlarged by CSS: sharp on every screen, and light for 512 x 512.
//   shade(r, c)  colour of a cell, -1..1        point(r, c)  lines of the tip
//   name(c), kind(c)  text and class of the label of a column
//   leave()      called when the pointer leaves the map
function matrix({id, label, rows, columns, shade, point, name, kind, leave = () => {}}) {
  const canvas = el("canvas",
    {width: columns, height: rows, role: "img", tabindex: 0, "aria-label": label});
  const [side, head] = ["rows", "columns"].map(kind =>
    el("div", {class: "axis " + kind, "aria-hidden": true}));
  const plot = el("div", {class: "plot"}, canvas);
  const box = scroll(label, el("div", {class: "matrix"}, el("div", {}), head, side, plot));
  let w, h, at = [0, 0];  // size of a cell in CSS pixels, the cell pointed at
  function axis(node, n, cell, edge, name = String, kind = () => "") {
    const every = 2 ** Math.max(0, Math.ceil(Math.log2(11 / cell)));  // a label needs 11 pixels
    node.replaceChildren(...range(n).filter(i => i % every === 0).map(i =>
      el("span", {class: kind(i), style: `${edge}: ${(i + 0.5) * cell}px`}, name(i))));
  }
  painters[id] = () => {
    const image = new ImageData(columns, rows), style = getComputedStyle(document.body);
    const [less, more] = ["--warm", "--accent"].map(key =>
      style.getPropertyValue(key).match(/\w\w/g).map(hex => parseInt(hex, 16)));
    for (const r of range(rows)) for (const c of range(columns)) {
      const value = shade(r, c), rgb = value < 0 ? less : more;
      image.data.set([...rgb, 255 * Math.abs(value)], 4 * (r * columns + c));
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    h = Math.max(3, Math.min(24, Math.floor(580 / rows)));
    w = name ? Math.max(11, Math.min(24, (box.clientWidth - 44) / columns)) : h;
    canvas.style = `width: ${w * columns}px; height: ${h * rows}px`;
    axis(side, rows, h, "top");
    axis(head, columns, w, "left", name, kind);
  };
  function go(r, c) {  // to the cell, or the nearest there is
    r = Math.min(rows - 1, Math.max(0, r));
    c = Math.min(columns - 1, Math.max(0, c));
    at = [r, c];
    plot.style = `--x: ${c * w}px; --y: ${r * h}px; --w: ${w}px; --h: ${h}px`;
    const {left, top} = canvas.getBoundingClientRect();
    tip(left + (c + 1) * w, top + (r + 1) * h, ...point(r, c));
  }
  canvas.onpointermove = canvas.onpointerdown = event =>
    go(Math.floor(event.offsetY / h), Math.floor(event.offsetX / w));
  const arrows = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
  canvas.onkeydown = event => {
    const step = arrows[event.key];
    if (step) { event.preventDefault(); go(at[0] + step[0], at[1] + step[1]); }
  };
  canvas.onpointerleave = canvas.onblur = () => { plot.style = ""; tip(); leave(); };
  return box;
}
const legend = (low, high, what, colours) => el("div", {class: "legend"}, low,
  el("i", {style: `background: linear-gradient(90deg, ${colours})`}), `${high} ${what}`);

// ---- the sections, from top to bottom
document.title = document.querySelector("h1").textContent = show(data.title);
const facts = {architecture: data.arch, parameters: compact(data.params),
  "tokens seen": compact(data.tokens), step: format(data.step),
  "unigram entropy": number(data.unigram_entropy)};
document.querySelector("dl").append(...Object.entries(facts).map(([name, value]) =>
  el("div", {}, el("dt", {}, name), el("dd", {}, value))));

function miniature([key, title, how]) {  // a small chart of a measure that training logs
  const values = log[key].map(point => point[1]);
  const low = Math.min(0, ...values), high = Math.max(low + 0.01, ...values);
  return el("div", {}, el("h3", {}, title, el("b", {}, number(values.at(-1)))),
    chart(title, 130, low, high * 1.05 - low * 0.05, [[title, "", log[key]]]),
    el("small", {}, how));
}
const losses = [...log.loss, ...log.val_loss].map(point => point[1]).sort((a, b) => a - b);
fill("curves", losses, values => {
  const entropy = data.unigram_entropy, low = Math.min(entropy, values[0]);
  const most = values[Math.floor(values.length * 0.97)];  // a steep start is cut off
  const room = Math.max(entropy, most) - low || 1;
  const lines = [["training", "pale", log.loss], ["validation", "", log.val_loss]]
    .filter(line => line[2].length);
  const small = curveMeasures.filter(([key]) => log[key].length).map(miniature);
  const none = log.val_loss.length ? "The log follows no concepts." :
    "The log holds no evaluations.";
  return [
    chart("loss against tokens seen", 340, low - room / 20, low + room * 1.08, lines, entropy),
    el("div", {class: "minis"}, small.length ? small : el("p", {}, none))];
});

// A Python format of tools/measures.py -> function
const formatter = form => form.endsWith("%") ? percent : form === "," ? x => format(x) : number;
fill("losses", data.losses, sets => Object.entries(sets).map(
  ([name, {unigram_entropy, ...results}]) => table("losses on " + name,
    ["masking", ...lossMeasures.map(([, heading]) => heading)],
    Object.entries(results).map(([masking, r]) =>
      [token(masking), ...lossMeasures.map(([key, , form]) => formatter(form)(r[key]))]),
    [token(name), unigram_entropy && `, unigram entropy ${number(unigram_entropy)} nats`])));
fill("splits", data.splits, kinds => table("loss by kind", ["kind", "loss", "share", ""],
  Object.entries(kinds).map(([name, {loss, share}]) => [token(name), number(loss), percent(share),
    el("i", {style: `width: ${14 * share}em`})])));
fill("health", data.health?.rows, rows => table("health", ["", ...data.health.columns], rows.map(
  ([name, how, ...values]) => [[name, el("small", {}, how)], ...values.map(number)])));

const [tops, usage, rises] = ["concepts", "usage", "one_by_one"].map(key => data[key] || []);
function drawSentence(box, {tokens, masked, guess, weights}) {  // the sentence, its heat map below
  const top = Math.max(...weights.map(row => Math.max(...row)));
  const shade = (c, t) => Math.sqrt(weights[c][t] / top);
  const right = t => guess[t] === tokens[t];
  const kind = t => !masked[t] ? "" : right(t) ? "masked" : "masked wrong";
  const guessed = t => right(t) ? "\u2713" : show(guess[t] || "?");
  const words = tokens.map((text, t) => el("bdi", {class: kind(t)},
    masked[t] ? prose(text).trim() || show(text) : prose(text)));
  const ruby = (word, t) => [/^ \S/.test(tokens[t]) && " ",  // the prediction above the word
    el("ruby", {}, word, el("rt", {class: kind(t)}, guessed(t)))];
  const colour = (c, at) => words.forEach((word, t) => {  // by the attention of concept c, or plain
    const share = c == null ? 0 : 55 * shade(c, t);
    word.className = kind(t) + (t === at ? " on" : "");
    word.style.background = `color-mix(in srgb, var(--accent) ${share}%, transparent)`;
  });
  const point = (c, t) => {
    colour(c, t);
    const best = (tops[c] || []).slice(0, 6);
    return [
      [el("b", {}, "concept " + c), " reads ", token(tokens[t]), " with " + percent(weights[c][t])],
      masked[t] && ["masked; the model predicts: ", guessed(t)],
      el("small", {}, best.map(([text], i) => [i ? "  " : "top tokens: ", token(text)]))];
  };
  box.replaceChildren(
    el("p", {class: "sentence"}, words.map((word, t) => masked[t] ? ruby(word, t) : word)),
    matrix({id: "attention-map", label: "attention of concepts (rows) over tokens (columns)",
      rows: weights.length, columns: tokens.length, shade, point, kind, leave: colour,
      name: t => show(tokens[t]) + (masked[t] && !right(t) ? " \u2192 " + guessed(t) : "")}),
    legend("0", percent(top), "of a concept's attention; square root scale",
      "transparent, var(--accent)"));
  painters["attention-map"]();
}
fill("attention", data.sentences?.[0]?.weights, () => {
  const box = el("div", {});
  const start = ({tokens}) => tokens.map(prose).join("").slice(0, 60);
  const select = el("select", {id: "sentence"}, data.sentences.map((sentence, i) =>
    el("option", {value: i}, `${i + 1}. ${start(sentence)}`)));
  select.onchange = () => drawSentence(box, data.sentences[select.value]);
  select.onchange();
  return [el("label", {for: "sentence"}, "sentence"), select, box];
});

fill("concepts", range(Math.max(tops.length, usage.length, rises.length)), numbers => {
  const most = Math.max(...tops.flat().map(([, pmi]) => pmi));
  const word = ([text, pmi, seen]) => el("div",
    {class: "word", title: `PMI ${number(pmi)}, seen ${seen}x`}, token(text),
    el("i", {style: `width: ${100 * Math.max(0, pmi) / most}%`}));
  const cards = numbers.map(c => {
    const notes = [usage.length > 0 && "use " + percent(usage[c]),
      rises.length > 0 && "loss " + signed(rises[c])];
    return el("article", {class: "card"}, el("h3", {}, "concept " + c),
      el("small", {}, notes.filter(Boolean).join(", ")), (tops[c] || []).map(word));
  });
  const input = el("input", {id: "filter", type: "search"});
  input.oninput = () => cards.forEach(card => {
    card.hidden = !card.textContent.toLowerCase().includes(input.value.toLowerCase());
  });
  return [el("label", {for: "filter"}, "filter"), input, el("div", {class: "cards"}, cards)];
});

fill("similarity", data.similarity, cosine => [
  matrix({id: "similarity-map", label: "cosine of pairs of concepts",
    rows: cosine.length, columns: cosine.length, shade: (a, b) => cosine[a][b],
    point: (a, b) => [`concepts ${a} and ${b}: ${number(cosine[a][b])}`]}),
  legend("-1", "1", "cosine", "var(--warm), transparent, var(--accent)")]);
fill("settings", Object.entries(data.settings), pairs => el("details", {},
  el("summary", {}, `all ${pairs.length}`),
  table("settings", ["setting", "value"],
    pairs.map(pair => pair.map(text => token(String(text)))))));

const paint = () => Object.values(painters).forEach(painter => painter());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
addEventListener("resize", paint);
paint();
</script>
"""
