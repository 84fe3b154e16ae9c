// The browser side of the desk. Python owns the plan and every figure; this file draws them, and answers the hand
// within one frame from the closed-form cost terms, so that a drag never waits for the kernel.

const SAVE_EVERY = 50; // ms between saves while the hand moves; the last value is always sent
const HAND_RESTS = 200; // ms without input after which the hand has left; key repeats stay one movement
const GROUP_FROM = 13; // with fewer rows a stage header would cost more room than it saves
const STD_RANGE = { min: -3, max: 1, step: 0.05 }; // minus k, so that right and up remove more, as on the ratio
const MOST_POINTS = 96; // a sparkline is about this many pixels wide
const NNBSP = "\u202f";
const DASH = "–";
const COLUMNS = [
  ["name", "layer", "The layer, and how many coupled producers share its channels"],
  ["kept", "kept", "Units kept, of all"],
  ["scores", "scores, cut", "Scores in ascending order: grey is removed, the accent colour is kept"],
  ["ratio", "ratio", "Share of the units removed, lowest scores first"],
  ["std", "std", "Removes units scoring more than this many standard deviations (σ) below the layer's mean"],
  ["grain", "grain", "What is removed"],
  ["lock", "lock", "A locked layer keeps its setting"],
  ["share", "params / FLOPs", "Share of the unpruned network's parameters (above) and FLOPs (below)"],
];

// ---- arithmetic, equal to Python's ------------------------------------------------------------------------------

/** Units a rule removes from a row: the lowest scores, never all of them. */
export function removedUnits(row, { rule, value }) {
  let count = 0;
  if (rule === "ratio") count = Math.floor(value * row.channels + 1e-9);
  if (rule === "std") {
    const limit = row.mean - value * row.std;
    count = row.scores.filter((score) => score < limit).length;
  }
  return Math.max(0, Math.min(count, row.channels - 1));
}

/** Units kept; where the browser cannot know (a hand-picked set, a bypass) the count Python gave. */
export function keptUnits(row, entry) {
  if (row.pinned || entry.grain === "weight") return row.channels;
  if (entry.grain !== "channel" || entry.rule === "manual") return entry.kept ?? row.channels;
  return row.channels - removedUnits(row, entry);
}

/** The k at which the std rule removes just as many units, or null where no k says it. */
export function equivalentStd(row, removed) {
  if (removed < 1 || removed >= row.scores.length || !(row.std > 0)) return null;
  return (row.mean - row.scores[removed]) / row.std;
}

/** Closed-form cost: the sum over terms of coefficient × product of (constant + Σ multiplicity × kept). */
export function evaluate(terms, kept) {
  let total = 0;
  for (const [coefficient, sizes] of terms) {
    let product = coefficient;
    for (const [constant, parts] of sizes) {
      let size = constant;
      for (const [layer, times] of parts) size += times * kept[layer];
      product *= size;
    }
    total += product;
  }
  return total;
}

function liveCost(terms, rows, entryOf) {
  if (!terms?.names) return null;
  const byName = new Map(rows.map((row) => [row.name, row]));
  const count = (name, of) => (byName.has(name) ? of(byName.get(name)) : NaN);
  const kept = terms.names.map((name) => count(name, (row) => keptUnits(row, entryOf(row))));
  const dense = terms.names.map((name) => count(name, (row) => row.channels));
  const bypassed = rows.some((row) => !row.pinned && !["channel", "weight"].includes(entryOf(row).grain));
  const cost = {
    params: evaluate(terms.params, kept), params0: evaluate(terms.params, dense),
    flops: 2 * evaluate(terms.macs, kept), flops0: 2 * evaluate(terms.macs, dense),
  };
  return bypassed || !Number.isFinite(cost.params + cost.flops) ? null : cost;
}

/** What an input's new value means for the plan. */
function settingFrom(field, input, row, entry, grains) {
  const value = Number(input);
  if (field === "grain") return { grain: grains[value] ?? entry.grain };
  if (field === "std") return { rule: "std", value: Math.round(-100 * value) / 100 + 0 };
  const exact = entry.grain === "channel" ? Math.round(value * row.channels) / row.channels : value;
  return { rule: exact > 0 ? "ratio" : "none", value: exact };
}

// ---- words and numbers ------------------------------------------------------------------------------------------

const count = (number) => Math.round(number).toLocaleString("en-GB");
const plain = (number, digits) => (Number(number.toFixed(digits)) + 0).toFixed(digits).replace("-", "−");
const signed = (number, digits) => (Number(number.toFixed(digits)) > 0 ? "+" : "") + plain(number, digits);

function percent(share, asChange = false) {
  const value = 100 * share;
  const digits = value === 0 || Math.abs(value) >= 9.95 ? 0 : 1;
  return `${asChange ? signed(value, digits) : plain(value, digits)}${NNBSP}%`;
}

/** Formats in the unit and to the digits that suit the unpruned figure, so that both compare and neither jumps. */
function inUnitOf(dense, unit = "") {
  const sizes = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const [size, letter] = sizes.find(([least]) => dense >= least) ?? [1, ""];
  const digits = size === 1 || dense / size >= 100 ? 0 : dense / size >= 10 ? 1 : 2;
  return (value) => `${(value / size).toFixed(digits)}${letter || unit ? NNBSP : ""}${letter}${unit}`;
}

// ---- nodes ------------------------------------------------------------------------------------------------------

const SVG_TAGS = new Set(["svg", "path", "line"]);
const ICONS = {
  pin: "M6 1.5h4l-.6 5 2.6 2.4H4l2.6-2.4zM8 9v5.5",
  lock: "M3.5 7h9v6.5h-9zM5.5 7V4.8a2.5 2.5 0 0 1 5 0V7",
  unlock: "M3.5 7h9v6.5h-9zM5.5 7V4.3a2.5 2.5 0 0 1 4.8-1",
  undo: "M6 3 3 6l3 3M3 6h6.5a3.5 3.5 0 0 1 0 7H6",
  redo: "M10 3l3 3-3 3M13 6H6.5a3.5 3.5 0 0 0 0 7H10",
  reset: "M12.6 5.5A5.2 5.2 0 1 0 13.2 8M13 2.5v3.2H9.8",
  fold: "M4 6l4 4 4-4",
  close: "M4 4l8 8M12 4l-8 8",
};

function h(tag, attributes = {}, ...children) {
  const svg = SVG_TAGS.has(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) setAttribute(node, name, value);
  node.append(...children); // strings become text nodes: nothing in a layer's name is read as markup
  return node;
}

function setAttribute(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value === true ? "" : value);
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const span = (name, ...children) => h("span", { class: name }, ...children);
const button = (name, attributes, ...children) =>
  h("button", { type: "button", class: `pl-button ${name}`, ...attributes }, ...children);
const icon = (name) =>
  h("svg", { class: "pl-icon", viewBox: "0 0 16 16", "aria-hidden": "true" }, h("path", { d: ICONS[name] }));

/** A thin bar: kept up to `now`, removed up to `before`, and an interval of half width `half` about `now`. */
function setBar(node, now, before, half = 0) {
  const lengths = { now, before, from: Math.max(0, now - half), to: Math.min(1, now + half) };
  for (const [name, length] of Object.entries(lengths)) node.style.setProperty(`--${name}`, length.toFixed(4));
  setAttribute(node, "data-interval", half > 0);
}

/** One side of a score curve as a closed step area: units `from` up to `to`, in at most MOST_POINTS steps. */
function stepArea(scores, from, to) {
  if (to <= from) return "";
  const [low, high] = [scores[0], scores[scores.length - 1]];
  const floor = low < 0 ? low - 0.06 * (high - low || 1) : 0; // from zero, unless scores go below it
  const x = (unit) => ((100 * unit) / scores.length).toFixed(2);
  const y = (unit) => (24 - (22 * (scores[unit] - floor)) / (high - floor || 1)).toFixed(2);
  const step = Math.max(1, scores.length / MOST_POINTS);
  let path = `M${x(from)} 24`;
  for (let unit = from; unit < to; unit += step) path += `V${y(Math.floor(unit))}H${x(Math.min(unit + step, to))}`;
  return `${path}V24Z`;
}

function makeSparkline() {
  const [removed, kept] = [h("path", { class: "pl-area-removed" }), h("path", { class: "pl-area-kept" })];
  const line = h("line", { class: "pl-cut", y1: 0, y2: 24 });
  const box = { class: "pl-spark", viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true" };
  const update = (row, gone, byHand) => {
    const cut = Math.min(gone, row.scores.length);
    const at = (100 * cut) / (row.scores.length || 1);
    setAttribute(removed, "d", stepArea(row.scores, 0, cut));
    setAttribute(kept, "d", stepArea(row.scores, cut, row.scores.length));
    for (const end of ["x1", "x2"]) setAttribute(line, end, at);
    setAttribute(line, "visibility", cut > 0 && !byHand ? null : "hidden"); // a hand-picked set has no threshold
  };
  return { node: h("svg", box, removed, kept, line), update };
}

// ---- header, totals, foot ---------------------------------------------------------------------------------------

function makeHeader(command) {
  const title = h("div", { class: "pl-title", role: "heading", "aria-level": 3 });
  const note = h("div", { class: "pl-note" });
  const action = (name, word, help) => {
    const node = button("pl-action", { "data-do": name, title: help }, icon(name), word);
    node.addEventListener("click", () => command(name));
    return node;
  };
  const undo = action("undo", "Undo", "Undo the last change (Ctrl+Z)");
  const redo = action("redo", "Redo", "Do the undone change again (Ctrl+Shift+Z)");
  const reset = action("reset", "Reset", "Set every unlocked layer back to none");
  const actions = h("div", { class: "pl-actions", role: "group", "aria-label": "history" }, undo, redo, reset);
  const node = h("div", { class: "pl-header" }, h("div", { class: "pl-heading" }, title, note), actions);
  const update = (header, can, anySet) => {
    setText(title, header.title ?? "");
    setText(note, header.note ?? "");
    setAttribute(note, "title", header.note);
    [undo.disabled, redo.disabled, reset.disabled] = [!can.undo, !can.redo, !anySet];
  };
  return { node, update };
}

function makeTotal(name, label, help) {
  const parts = { before: span("pl-before"), now: span("pl-now"), change: span("pl-change") };
  const bar = h("div", { class: "pl-bar pl-bar-total", "aria-hidden": "true" });
  const note = h("div", { class: "pl-total-note" });
  const words = { class: "pl-total", "data-total": name, role: "group", "aria-label": label, title: help };
  const values = h("div", { class: "pl-values" }, parts.before, span("pl-arrow", "→"), parts.now, parts.change);
  const node = h("div", words, h("div", { class: "pl-label" }, label), values, bar, note);
  const update = ({ before, now, change, text = "", stale }) => {
    Object.entries({ before, now, change }).forEach(([part, value]) => setText(parts[part], value));
    setText(note, text);
    node.classList.toggle("pl-stale", Boolean(stale));
  };
  return { node, bar, note, update };
}

function makeTotals() {
  const params = makeTotal("params", "parameters", "Parameters, unpruned → planned");
  const flops = makeTotal("flops", "FLOPs", "Floating point operations, 2 per multiply-add, unpruned → planned");
  const bytes = makeTotal("bytes", "size on disk", "Bytes of the weights, unpruned → planned");
  const accuracy = makeTotal("accuracy", "accuracy",
    "Accuracy, unpruned → planned, and the 95 % interval of the change on the same images");
  const spoken = h("span", { class: "pl-hidden", role: "status", "aria-live": "polite" });
  const cells = [params, flops, bytes, accuracy].map((cell) => cell.node);

  const amount = (cell, now, dense, unit, more) => {
    const known = dense > 0 && Number.isFinite(now);
    const [format, part] = [inUnitOf(dense, unit), known ? now / dense : 0];
    const [before, after] = known ? [format(dense), format(now)] : [DASH, DASH];
    cell.update({ before, now: after, change: known ? percent(part - 1, true) : "", ...more });
    setBar(cell.bar, part, known ? 1 : 0);
  };
  const costs = (cost, stale) => {
    const sparse = cost.nonzero < cost.params ? `${inUnitOf(cost.params0)(cost.nonzero)} of them non-zero` : "";
    amount(params, cost.params, cost.params0, "", { text: sparse, stale: stale.costs });
    amount(flops, cost.flops, cost.flops0, "", { stale: stale.costs });
    amount(bytes, cost.bytes, cost.bytes0, "B", { stale: stale.bytes });
    params.note.classList.toggle("pl-stale", stale.nonzero);
  };
  const measured = (estimate, stale) => {
    if (!estimate.state || estimate.state === "none") {
      setBar(accuracy.bar, 0, 0);
      setText(spoken, "");
      return accuracy.update({ before: DASH, now: DASH, change: "", text: "not measured yet" });
    }
    const [before, now, half] = [estimate.base, estimate.accuracy, estimate.half].map((part) => plain(100 * part, 1));
    const change = `${signed(100 * estimate.change, 1)} ± ${half} points`;
    const sample = `n = ${count(estimate.n)} of ${count(estimate.total)}, ${estimate.precision}`;
    const text = stale ? `updating… ${sample}` : sample;
    accuracy.update({ before, now: `${now}${NNBSP}%`, change, text, stale });
    setBar(accuracy.bar, estimate.accuracy, estimate.base, estimate.half);
    return setText(spoken, stale ? "accuracy is being updated" : `accuracy ${now} %, a change of ${change}, ${sample}`);
  };
  return { node: h("div", { class: "pl-totals" }, ...cells, spoken), costs, measured };
}

function makeFoot() {
  const text = h("span", { role: "status", "aria-live": "polite", class: "pl-status-text" });
  const done = h("span", { class: "pl-progress-done" });
  const progress = h("span", { class: "pl-progress", role: "progressbar", "aria-label": "progress" }, done);
  const share = span("pl-progress-share");
  const message = h("span");
  const close = button("pl-close", { "aria-label": "close the error" }, icon("close"));
  const error = h("div", { class: "pl-error", role: "alert", hidden: true }, message, close);
  let dismissed = "";
  close.addEventListener("click", () => {
    dismissed = message.textContent;
    error.hidden = true;
  });
  const update = (status) => {
    const known = typeof status.progress === "number";
    const part = known ? Math.floor(100 * Math.max(0, Math.min(status.progress, 1))) : 0;
    setText(text, status.text ?? "");
    progress.hidden = !known;
    setText(share, known ? `${part}${NNBSP}%` : "");
    done.style.width = `${part}%`;
    setAttribute(progress, "aria-valuenow", known ? part : null);
    if (!status.error) dismissed = "";
    setText(message, status.error ?? "");
    error.hidden = !status.error || status.error === dismissed;
  };
  return { node: h("div", {}, error, h("div", { class: "pl-status" }, text, progress, share)), update };
}

// ---- rows -------------------------------------------------------------------------------------------------------

const cell = (name, ...children) => h("td", { class: `c-${name}` }, ...children);

function slider(row, field, bounds) {
  const names = { "data-layer": row.name, "data-field": field, "aria-label": `${field} of ${row.name}` };
  return h("input", { type: "range", ...names, ...bounds });
}

/** Shows a value on a slider; a thumb already within half a step stays, so that a drag is never fought. */
function setSlider(input, value, words) {
  const [low, high, step] = [Number(input.min), Number(input.max), Number(input.step)];
  if (Math.abs(Number(input.value) - value) > step / 2) input.value = String(value);
  input.style.setProperty("--at", high > low ? ((Number(input.value) - low) / (high - low)).toFixed(4) : "0");
  setAttribute(input, "aria-valuetext", words);
}

/** The cells every kind of row has: name, units kept, shares. */
function commonCells(first) {
  const [kind, kept, note] = ["kind", "number", "kind"].map((part) => h("div", { class: `pl-${part}` }));
  const name = h("div", { class: "pl-name" }, h("span"), h("span"));
  const title = h("th", { scope: "row", class: "c-name", tabindex: first.pinned ? 0 : null }, name, kind);
  const lines = ["parameters", "FLOPs"].map((what) => ({ what, bar: span("pl-bar"), text: span("pl-number") }));
  const share = cell("share", ...lines.map(({ bar, text }) => h("div", { class: "pl-share" }, bar, text)));
  const setShares = (values, largest) => lines.forEach(({ what, bar, text }, index) => {
    setBar(bar, largest ? values[index] / largest : 0, 0);
    setText(text, percent(values[index]));
    setAttribute(text.parentNode, "title", `${percent(values[index])} of the unpruned network's ${what}`);
  });
  const setKept = (units, channels, words) => {
    setText(kept, `${units}/${channels}`);
    setText(note, words);
  };
  const update = (row, units, words, largest) => {
    const tail = row.name.length - row.name.split(".").slice(-2).join(".").length;
    setText(name.firstChild, row.name.slice(0, tail));
    setText(name.lastChild, row.name.slice(tail));
    setText(kind, row.members > 1 ? `${row.kind} · ${row.members} coupled` : row.kind);
    setAttribute(title, "title", `${row.name} (${kind.textContent})`);
    setKept(units, row.channels, words);
    setShares([row.params_share, row.flops_share], largest);
  };
  return { title, kept: cell("kept", kept, note), share, setKept, setShares, update };
}

function makePinnedRow(first) {
  const [common, reason] = [commonCells(first), h("span")];
  const why = h("td", { class: "c-wide", colspan: 5 }, h("div", { class: "pl-why" }, icon("pin"), reason));
  const words = { class: "pl-row pl-pinned", "data-row": first.name };
  const update = (row, entry, { largest }) => {
    common.update(row, row.channels, "pinned", largest);
    setText(reason, `pinned: ${row.pinned.replace(/^pinned:\s*/i, "")}`);
    setAttribute(why, "title", reason.textContent);
  };
  return { node: h("tr", words, common.title, common.kept, why, common.share), update };
}

/** What a row's setting amounts to: units gone, and ratio and std, null where the browser cannot know them. */
function amounts(row, entry) {
  const units = entry.grain === "channel";
  const gone = row.channels - keptUnits(row, entry);
  const ratio = entry.rule === "ratio" ? entry.value : units ? gone / row.channels : entry.rule === "none" ? 0 : null;
  const std = entry.rule === "std" ? entry.value : units ? equivalentStd(row, gone) : null;
  return { units, gone, ratio, std };
}

function noteOf(entry, { units, gone, ratio }) {
  if (entry.grain === "weight") return ratio > 0 ? `${percent(ratio)} zero` : "";
  return entry.rule === "manual" ? "by hand" : units && gone ? `−${gone}` : "";
}

function makeRow(first) {
  const [common, spark] = [commonCells(first), makeSparkline()];
  const ratio = slider(first, "ratio", { min: 0, value: 0 });
  const std = slider(first, "std", { ...STD_RANGE, value: STD_RANGE.min });
  const grain = slider(first, "grain", { min: 0, step: 1, value: 0 });
  const [ratioText, stdText, word] = [span("pl-number"), span("pl-number"), span("pl-word")];
  const names = { "data-layer": first.name, "data-field": "lock", "aria-label": `lock ${first.name}` };
  const lock = button("pl-lock", names, icon("unlock"));
  const cells = [cell("scores", spark.node), cell("ratio", ratio, ratioText), cell("std", std, stdText),
    cell("grain", grain, word), cell("lock", lock)];
  const node = h("tr", { class: "pl-row", "data-row": first.name }, common.title, common.kept, ...cells, common.share);

  const setLimits = (row, entry, grains) => {
    const steps = entry.grain === "channel" ? row.channels : 100;
    setAttribute(ratio, "step", 1 / steps);
    setAttribute(ratio, "max", (steps - 1) / steps + 1e-6); // a little over, or rounding hides the last step
    setAttribute(grain, "max", Math.max(0, grains.length - 1));
    grain.hidden = grains.length < 2;
    grain.disabled = entry.locked;
    ratio.disabled = entry.locked || row.channels < 2;
    std.disabled = ratio.disabled || !row.scores.length;
  };
  const update = (row, entry, { grains, largest }) => {
    setLimits(row, entry, grains);
    const now = amounts(row, entry);
    const left = row.channels - now.gone;
    const [none, result] = [entry.rule === "none" ? "none" : DASH, `keeps ${left} of ${row.channels}`];
    common.update(row, left, noteOf(entry, now), largest);
    spark.update(row, now.units ? now.gone : 0, entry.rule === "manual");
    setText(ratioText, now.ratio === null ? DASH : percent(now.ratio));
    setSlider(ratio, now.ratio ?? 0, `${now.ratio === null ? "not known" : percent(now.ratio)}, ${result}`);
    setText(stdText, now.std === null ? none : `${plain(now.std, 2)}${NNBSP}σ`);
    setSlider(std, Math.max(STD_RANGE.min, Math.min(-(now.std ?? 3), STD_RANGE.max)),
      now.std === null ? "none" : `${plain(now.std, 2)} standard deviations below the mean, ${result}`);
    setText(word, entry.grain);
    setSlider(grain, Math.max(0, grains.indexOf(entry.grain)), entry.grain);
    setAttribute(node, "data-rule", entry.rule);
    setAttribute(lock, "aria-pressed", String(Boolean(entry.locked)));
    setAttribute(lock, "title", entry.locked ? "Locked: press to unlock" : "Lock this setting");
    setAttribute(lock.querySelector("path"), "d", ICONS[entry.locked ? "lock" : "unlock"]);
  };
  return { node, update };
}

let stagesMade = 0;

function makeStage(stage, rows, folded) {
  const id = `prunelab-stage-${(stagesMade += 1)}`;
  const [body, common, bar] = [h("tbody", { id }), commonCells({}), h("div", { class: "pl-bar pl-bar-total" })];
  const fold = button("pl-fold", { "aria-controls": id }, icon("fold"), stage);
  const head = h("tbody", { class: "pl-stage" }, h("tr", { "data-stage": stage },
    h("th", { scope: "rowgroup", class: "c-name" }, fold), common.kept, cell("scores", bar),
    h("td", { class: "c-wide", colspan: 4 }, `${rows.length} layers`), common.share));
  const show = () => {
    body.hidden = folded.has(stage);
    setAttribute(fold, "aria-expanded", String(!body.hidden));
  };
  fold.addEventListener("click", () => {
    if (!folded.delete(stage)) folded.add(stage);
    show();
  });
  const update = (now, entryOf) => {
    const sum = (of) => now.reduce((total, row) => total + of(row), 0);
    const [kept, channels] = [sum((row) => keptUnits(row, entryOf(row))), sum((row) => row.channels)];
    common.setKept(kept, channels, "");
    setBar(bar, kept / channels, 1);
    common.setShares([sum((row) => row.params_share), sum((row) => row.flops_share)], 0);
  };
  show();
  return { body, head, update };
}

// ---- the table --------------------------------------------------------------------------------------------------

/** Consecutive rows of one stage, as [stage, rows]; a stage of one row gets no header of its own. */
function runsOf(rows) {
  if (rows.length < GROUP_FROM) return [["", rows]];
  const runs = [];
  for (const row of rows) {
    if (runs.length && runs[runs.length - 1][0] === row.stage) runs[runs.length - 1][1].push(row);
    else runs.push([row.stage, [row]]);
  }
  return runs.map(([stage, members]) => [members.length > 1 ? stage : "", members]);
}

function makeTable() {
  const heads = COLUMNS.map(([name, label, help]) => h("th", { scope: "col", class: `c-${name}`, title: help }, label));
  const widths = h("colgroup", {}, ...COLUMNS.map(([name]) => h("col", { class: `c-${name}` })));
  const caption = h("caption", { class: "pl-hidden" }, "Layers and what is removed from them");
  const table = h("table", {}, caption, widths, h("thead", {}, h("tr", {}, ...heads)));
  const node = h("div", { class: "pl-scroll" }, table);
  const folded = new Set();
  let [views, stages, bodies, shape] = [new Map(), [], [], null];

  const build = (rows) => {
    const focused = node.getRootNode().activeElement;
    const [focus, top] = [node.contains(focused) ? { ...focused.dataset } : {}, node.scrollTop];
    bodies.forEach((body) => body.remove());
    [views, stages, bodies] = [new Map(), [], []];
    for (const [stage, members] of runsOf(rows)) {
      const group = stage ? makeStage(stage, members, folded) : { body: h("tbody") };
      if (stage) stages.push({ update: group.update, members: members.map((row) => row.name) });
      for (const row of members) views.set(row.name, row.pinned ? makePinnedRow(row) : makeRow(row));
      group.body.append(...members.map((row) => views.get(row.name).node));
      bodies.push(...(stage ? [group.head, group.body] : [group.body]));
    }
    const nothing = h("tr", {}, h("td", { class: "c-wide", colspan: COLUMNS.length }, "No layers yet."));
    if (!rows.length) bodies.push(h("tbody", {}, nothing));
    table.append(...bodies);
    node.scrollTop = top;
    const held = ({ dataset }) => dataset.layer === focus.layer && dataset.field === focus.field;
    [...table.querySelectorAll("[data-field]")].find(held)?.focus({ preventScroll: true });
  };
  const update = (rows, entryOf, grains, selected) => {
    const now = JSON.stringify(rows.map((row) => [row.name, Boolean(row.pinned), row.stage]));
    if (now !== shape) build(rows); // otherwise every node stays, and with it focus and a drag under way
    shape = now;
    const largest = rows.reduce((most, row) => Math.max(most, row.params_share, row.flops_share), 0);
    for (const row of rows) {
      const [view, entry] = [views.get(row.name), entryOf(row)];
      const same = view.row === row && view.entry === entry && view.grains === grains;
      if (!same) view.update(row, entry, { grains, largest });
      Object.assign(view, { row, entry, grains });
      setAttribute(view.node, "aria-current", row.name === selected ? "true" : null);
    }
    for (const stage of stages) stage.update(stage.members.map((name) => views.get(name).row), entryOf);
  };
  return { node, update };
}

// ---- the desk ---------------------------------------------------------------------------------------------------

/** Calls at once, then at most every `wait` ms, and always once more after the last request. */
function throttle(work, wait) {
  let [timer, due] = [null, false];
  const run = () => {
    timer = setTimeout(() => (due ? run() : (timer = null)), wait);
    due = false;
    work();
  };
  const flush = () => {
    clearTimeout(timer);
    timer = null;
    if (due) work();
    due = false;
  };
  const call = () => {
    due = true;
    if (timer === null) run();
  };
  return { call, flush };
}

function render({ model, el }) {
  const get = (name, otherwise) => model.get(name) ?? otherwise;
  const saver = throttle(() => model.save_changes(), SAVE_EVERY);
  const [header, totals, table, foot] = [makeHeader(command), makeTotals(), makeTable(), makeFoot()];
  // JupyterLab's command mode would otherwise take the sliders' own keys to move between cells, or to delete them.
  const root = h("div", { class: "prunelab-desk", "data-lm-suppress-shortcuts": "true" },
    header.node, totals.node, table.node, foot.node);
  const unset = new WeakMap(); // entries of rows the plan does not name
  const fresh = { figures: true, estimate: true }; // false from a change until Python has answered it
  let layers = get("layers", {});
  let [hand, pressed, owed, rest] = [null, false, false, 0]; // the row being moved; whether Python still lacks it
  let [frame, figuresCame] = [0, false];

  const rowOf = (name) => get("rows", []).find((row) => row.name === name);
  const isFresh = (trait) => fresh[trait] && (get(trait, {}).edits ?? Infinity) >= get("edits", 0);
  function entryOf(row) {
    if (layers[row.name]) return layers[row.name];
    const grain = get("grains", [])[0] ?? "channel";
    if (!unset.has(row)) unset.set(row, { rule: "none", value: 0, grain, locked: false, kept: row.channels });
    return unset.get(row);
  }

  function paint() {
    frame ||= requestAnimationFrame(draw);
  }
  function draw() {
    [frame, figuresCame] = [0, false];
    const [rows, status, estimate] = [get("rows", []), get("status", {}), get("estimate", {})];
    const anySet = rows.some((row) => !row.pinned && !entryOf(row).locked && entryOf(row).rule !== "none");
    header.update(get("header", {}), get("can", {}), anySet);
    table.update(rows, entryOf, get("grains", []), get("selected", ""));
    drawCosts(rows);
    totals.measured(estimate, estimate.state !== "ready" || !isFresh("estimate"));
    foot.update(status);
    setAttribute(root, "aria-busy", status.busy ? "true" : null);
  }
  function drawCosts(rows) {
    const [figures, stale] = [get("figures", {}), !isFresh("figures")];
    const live = liveCost(get("terms", null), rows, entryOf);
    if (!live || (!stale && !hand)) return totals.costs(figures, { costs: stale, bytes: stale, nonzero: stale });
    // Weights of one width make the bytes exact; otherwise they are a guess until Python answers, and look like one.
    const uneven = figures.bytes0 % live.params0 !== 0;
    const bytes = (figures.bytes0 * live.params) / live.params0;
    return totals.costs({ ...figures, ...live, bytes }, { costs: false, bytes: stale && uneven, nonzero: stale });
  }

  // The user's changes: at once in the model and on the screen, throttled to Python.
  function put(next) {
    [layers, owed] = [next, false];
    model.set("layers", next);
    model.set("edits", get("edits", 0) + 1);
    saver.call();
    paint();
  }
  function edit(row, change) {
    const entry = { ...entryOf(row), ...change };
    put({ ...layers, [row.name]: { ...entry, kept: keptUnits(row, entry) } });
  }
  function letGo(wait) {
    clearTimeout(rest);
    rest = setTimeout(() => {
      hand = null;
      if (owed) put(layers);
      paint();
    }, wait);
  }
  function command(name) {
    saver.flush(); // Python must know the last value before it moves away from it
    clearTimeout(rest);
    [hand, owed] = [null, false]; // what comes back is asked for, so no row is held against it
    model.send({ do: name });
  }
  function onInput({ target }) {
    const row = target.dataset.field && rowOf(target.dataset.layer);
    if (!row) return;
    hand = row.name;
    if (!pressed) letGo(HAND_RESTS);
    edit(row, settingFrom(target.dataset.field, target.value, row, entryOf(row), get("grains", [])));
  }
  function onPress({ target }) {
    if (target.type === "range") pressed = true;
    if (pressed) clearTimeout(rest);
  }
  function onRelease() {
    if (pressed) letGo(HAND_RESTS);
    pressed = false;
  }
  function onFocus({ target }) {
    const name = target.closest("[data-row]")?.dataset.row;
    if (!name || get("selected") === name) return;
    model.set("selected", name);
    saver.call();
  }
  function onClick(event) {
    onFocus(event);
    const row = rowOf(event.target.closest('[data-field="lock"]')?.dataset.layer);
    if (row) edit(row, { locked: !entryOf(row).locked });
  }
  function onClear({ target }) {
    const row = target.type === "range" && !target.disabled && rowOf(target.dataset.layer);
    if (row) edit(row, { rule: "none", value: 0 });
  }
  function onKey(event) {
    if (["Backspace", "Delete"].includes(event.key)) onClear(event);
    const key = event.key.toLowerCase();
    if (!(event.ctrlKey || event.metaKey) || !["z", "y"].includes(key)) return;
    event.preventDefault();
    const what = key === "y" || event.shiftKey ? "redo" : "undo";
    if (get("can", {})[what]) command(what);
  }

  // Python's changes, and those of other views of the same model; a row in the user's hand stays the user's.
  function onLayers() {
    const incoming = get("layers", {});
    if (incoming === layers) return;
    owed = hand !== null && hand in layers;
    layers = owed ? { ...incoming, [hand]: layers[hand] } : incoming;
    if (!figuresCame) fresh.figures = false;
    paint();
  }
  const answered = (trait) => () => {
    fresh[trait] = true;
    figuresCame ||= trait === "figures";
    paint();
  };
  const traits = { layers: onLayers, revision: onLayers, figures: answered("figures"), estimate: answered("estimate"),
    edits: () => Object.assign(fresh, { figures: false, estimate: false }) };
  for (const name of ["header", "rows", "grains", "terms", "status", "can", "selected"]) traits[name] = paint;
  const events = { input: onInput, change: onRelease, pointerdown: onPress, click: onClick, focusin: onFocus,
    dblclick: onClear, keydown: onKey };
  const ups = ["pointerup", "pointercancel"]; // a drag may end anywhere in the page

  Object.entries(traits).forEach(([name, listener]) => model.on(`change:${name}`, listener));
  Object.entries(events).forEach(([name, listener]) => root.addEventListener(name, listener));
  ups.forEach((name) => window.addEventListener(name, onRelease));
  el.append(root);
  draw();
  return () => {
    saver.flush();
    cancelAnimationFrame(frame);
    clearTimeout(rest);
    Object.entries(traits).forEach(([name, listener]) => model.off(`change:${name}`, listener));
    ups.forEach((name) => window.removeEventListener(name, onRelease));
    root.remove();
  };
}

export default { render };
