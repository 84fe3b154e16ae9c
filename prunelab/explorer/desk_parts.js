// The desk's pieces: header, totals, status line, and one row per layer. Joined with desk_base.js and desk.js.

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
    const repair = estimate.repair ? `, ${estimate.repair}` : "";
    const sample = `n = ${count(estimate.n)} of ${count(estimate.total)}, ${estimate.precision}${repair}`;
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

/** The button that removes a layer or block, or brings it back: one place, so that the focus stays on it. */
function makeRemover(unit, removed) {
  const [word, sign] = removed ? ["restore", "undo"] : ["bypass", "close"];
  const help = removed ? `Bring ${unit} back, with its settings` : `Remove ${unit}: its input passes through`;
  const names = { "data-layer": unit, "data-field": "unit", "data-do": word };
  return button("pl-lock pl-remove", { ...names, "aria-label": help, title: help }, icon(sign));
}

/** A block, or a layer that was removed: one button, no sliders. */
function makeUnitRow(unit) {
  const common = commonCells({});
  const kind = cell("kept", span("pl-number", unit.removed ? "removed" : unit.kind));
  const wide = h("td", { class: "c-wide", colspan: 4 }, unit.removed ? "its input passes through" : "");
  const words = { class: "pl-unit", "data-unit": unit.name, "data-removed": unit.removed };
  const update = (now, largest) => common.update({ ...now, members: 1, channels: 0 }, 0, "", largest);
  const remover = cell("lock", makeRemover(unit.name, unit.removed));
  return { node: h("tr", words, common.title, kind, wide, remover, common.share), update };
}

function makePinnedRow(first) {
  const [common, reason] = [commonCells(first), h("span")];
  const why = h("td", { class: "c-wide", colspan: 4 }, h("div", { class: "pl-why" }, icon("pin"), reason));
  const remove = cell("lock", ...(first.unit ? [makeRemover(first.unit, false)] : []));
  const words = { class: "pl-row pl-pinned", "data-row": first.name };
  const update = (row, entry, { largest }) => {
    common.update(row, row.channels, "pinned", largest);
    setText(reason, `pinned: ${row.pinned.replace(/^pinned:\s*/i, "")}`);
    setAttribute(why, "title", reason.textContent);
  };
  return { node: h("tr", words, common.title, common.kept, why, remove, common.share), update };
}

/** What a row's setting amounts to: units gone, and ratio and std, null where the browser cannot know them. */
function amounts(row, entry) {
  const units = entry.grain === "channel";
  const gone = row.channels - keptUnits(row, entry);
  const ratio = entry.rule === "ratio" ? entry.value : units ? gone / row.channels : entry.rule === "none" ? 0 : null;
  const std = entry.rule === "std" ? entry.value : units ? equivalentStd(row, gone) : null;
  return { units, gone, ratio, std };
}

function noteOf(row, entry, { units, gone, ratio }) {
  if (entry.grain === "weight") return ratio > 0 ? `${percent(ratio)} zero` : "";
  if (entry.rule === "manual") return "by hand";
  // A rule that rounding left without effect says so.
  if (!gone) return units && entry.rule !== "none" && row.step > 1 ? `in ${row.step}s` : "";
  return units ? `−${gone}` : "";
}

function makeRow(first) {
  const [common, spark, curve] = [commonCells(first), makeSparkline(), makeCurve()];
  const ratio = slider(first, "ratio", { min: 0, value: 0 });
  const std = slider(first, "std", { ...STD_RANGE, value: STD_RANGE.min });
  const grain = slider(first, "grain", { min: 0, step: 1, value: 0 });
  const [ratioText, stdText, word] = [span("pl-number"), span("pl-number"), span("pl-word")];
  const names = { "data-layer": first.name, "data-field": "lock", "aria-label": `lock ${first.name}` };
  const lock = button("pl-lock", names, icon("unlock"));
  const remove = first.unit ? [makeRemover(first.unit, false)] : [];
  const lane = span("pl-lane", curve.node, ratio);
  const cells = [cell("scores", spark.node), cell("ratio", lane, ratioText), cell("std", std, stdText),
    cell("grain", grain, word), cell("lock", lock, ...remove)];
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
  const update = (row, entry, { grains, largest, curves }) => {
    setLimits(row, entry, grains);
    const now = amounts(row, entry);
    const left = row.channels - now.gone;
    const [none, result] = [entry.rule === "none" ? "none" : DASH, `keeps ${left} of ${row.channels}`];
    common.update(row, left, noteOf(row, entry, now), largest);
    spark.update(row, now.units ? now.gone : 0, entry.rule === "manual");
    const shown = entry.grain === curves.grain ? curves : {};
    const [cut, most] = now.units ? [now.gone / row.channels, 1 - 1 / row.channels] : [now.ratio ?? 0, 0.99];
    setAttribute(lane, "title", curve.update(shown, row, cut, most) || null);
    setText(ratioText, now.ratio === null ? DASH : percent(now.ratio));
    setSlider(ratio, now.ratio ?? 0, `${now.ratio === null ? "not known" : percent(now.ratio)}, ${result}${aloneWords(shown, row, cut)}`);
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

function makeStage(stage, count, folded) {
  const id = `prunelab-stage-${(stagesMade += 1)}`;
  const [body, common, bar] = [h("tbody", { id }), commonCells({}), h("div", { class: "pl-bar pl-bar-total" })];
  const fold = button("pl-fold", { "aria-controls": id }, icon("fold"), stage);
  const head = h("tbody", { class: "pl-stage" }, h("tr", { "data-stage": stage },
    h("th", { scope: "rowgroup", class: "c-name" }, fold), common.kept, cell("scores", bar),
    h("td", { class: "c-wide", colspan: 4 }, `${count} ${count === 1 ? "layer" : "layers"}`), common.share));
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
    setBar(bar, channels ? kept / channels : 0, 1);
    common.setShares([sum((row) => row.params_share), sum((row) => row.flops_share)], 0);
  };
  show();
  return { body, head, update };
}
