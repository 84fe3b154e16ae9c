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
  ["lock", "lock", "A locked layer keeps its setting; ✕ removes a whole layer"],
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
  return inSteps(row, Math.max(0, Math.min(count, row.channels - 1)));
}

/** Of the units that a rule removes, as many as leave a whole number of the row's steps. */
function inSteps(row, removed) {
  const kept = Math.ceil((row.channels - removed) / row.step) * row.step;
  return Math.max(0, row.channels - kept);
}

/** Units kept; where the browser cannot know (a hand-picked set) the count Python gave. */
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
  const cost = { params: evaluate(terms.params, kept), flops: 2 * evaluate(terms.macs, kept) };
  return Number.isFinite(cost.params + cost.flops) ? cost : null;
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
