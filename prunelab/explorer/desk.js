// The desk: its table, the traits it shares with Python, and the user's hands. Joined with desk_base.js and desk_parts.js.

// ---- the table --------------------------------------------------------------------------------------------------

/** Rows and units in order of execution: a unit stands before the rows of what it holds, or held. */
function inOrder(rows, units) {
  const before = (at) => units.filter((unit) => unit.at === at);
  return [...rows.flatMap((row, at) => [...before(at), row]), ...before(rows.length)];
}

const isUnit = (row) => "removed" in row;

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
  const keyOf = (row) => (isUnit(row) ? `unit ${row.name}` : row.name);
  const viewOf = (row) => (isUnit(row) ? makeUnitRow(row) : row.pinned ? makePinnedRow(row) : makeRow(row));

  const build = (rows) => {
    const focused = node.getRootNode().activeElement;
    const [focus, top] = [node.contains(focused) ? { ...focused.dataset } : {}, node.scrollTop];
    bodies.forEach((body) => body.remove());
    [views, stages, bodies] = [new Map(), [], []];
    const runs = runsOf(rows);
    const sizes = runs.map(([, members]) => members.reduce((sum, row) => sum + (row.channels ?? 0), 0));
    node.style.setProperty("--digits", String(Math.max(0, ...sizes)).length);
    for (const [stage, members] of runs) {
      const layers = members.filter((row) => !isUnit(row)).map((row) => row.name);
      const group = stage ? makeStage(stage, layers.length, folded) : { body: h("tbody") };
      if (stage) stages.push({ update: group.update, members: layers });
      for (const row of members) views.set(keyOf(row), viewOf(row));
      group.body.append(...members.map((row) => views.get(keyOf(row)).node));
      bodies.push(...(stage ? [group.head, group.body] : [group.body]));
    }
    const nothing = h("tr", {}, h("td", { class: "c-wide", colspan: COLUMNS.length }, "No layers yet."));
    if (!rows.length) bodies.push(h("tbody", {}, nothing));
    table.append(...bodies);
    node.scrollTop = top;
    const held = ({ dataset }) => dataset.layer === focus.layer && dataset.field === focus.field;
    [...table.querySelectorAll("[data-field]")].find(held)?.focus({ preventScroll: true });
  };
  const update = (rows, units, entryOf, grains, selected, curves) => {
    const all = inOrder(rows, units);
    const now = JSON.stringify(all.map((row) => [keyOf(row), Boolean(row.pinned), row.stage, row.unit, row.removed]));
    if (now !== shape) build(all); // otherwise every node stays, and with it focus and a drag under way
    shape = now;
    const largest = rows.reduce((most, row) => Math.max(most, row.params_share, row.flops_share), 0);
    for (const row of rows) {
      const [view, entry] = [views.get(row.name), entryOf(row)];
      const same = view.row === row && view.entry === entry && view.grains === grains && view.curves === curves;
      if (!same) view.update(row, entry, { grains, largest, curves });
      Object.assign(view, { row, entry, grains, curves });
      setAttribute(view.node, "aria-current", row.name === selected ? "true" : null);
    }
    for (const unit of units) views.get(keyOf(unit)).update(unit, largest);
    const ratio = COLUMNS.findIndex(([name]) => name === "ratio");
    setCurveHead(heads[ratio], COLUMNS[ratio], curves);
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
  const root = h("div", { class: "prunelab-desk" }, header.node, totals.node, table.node, foot.node);
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
    const [rows, units, status, estimate] = [get("rows", []), get("units", []), get("status", {}), get("estimate", {})];
    const anySet = units.some((unit) => unit.removed) || rows.some((row) => !row.pinned && !entryOf(row).locked && entryOf(row).rule !== "none");
    header.update(get("header", {}), get("can", {}), anySet);
    table.update(rows, units, entryOf, get("grains", []), get("selected", ""), get("curves", {}));
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
    const uneven = figures.bytes0 % figures.params0 !== 0;
    const bytes = (figures.bytes0 * live.params) / figures.params0;
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
  function command(name, more = {}) {
    saver.flush();
    clearTimeout(rest);
    [hand, owed] = [null, false]; // what comes back is asked for, so no row is held against it
    // While the kernel is busy a message overtakes the traits saved before it, so it names the edit it follows.
    model.send({ do: name, ...more, edits: get("edits", 0) });
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
    const unit = event.target.closest('[data-field="unit"]')?.dataset;
    if (unit) command(unit.do, { unit: unit.layer });
  }
  function onClear({ target }) {
    const row = target.type === "range" && !target.disabled && rowOf(target.dataset.layer);
    if (row) edit(row, { rule: "none", value: 0 });
  }
  // JupyterLab's command mode would otherwise take the sliders' own keys to move between cells, or to delete them. It
  // looks for this mark on the focused node alone, before the event comes down here; saving stays JupyterLab's.
  function guard({ target, key, ctrlKey, metaKey }) {
    const saving = (ctrlKey || metaKey) && key.toLowerCase() === "s";
    if (root.contains(target)) setAttribute(target, "data-lm-suppress-shortcuts", saving ? null : "true");
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
  for (const name of ["header", "rows", "units", "grains", "terms", "status", "can", "selected", "curves"]) traits[name] = paint;
  const events = { input: onInput, change: onRelease, pointerdown: onPress, click: onClick, focusin: onFocus,
    dblclick: onClear, keydown: onKey };
  const ups = ["pointerup", "pointercancel"]; // a drag may end anywhere in the page

  // Python draws pictures: it must know whether the page is dark, now and when the theme changes.
  const tellTheme = () => {
    const dark = document.body.dataset.jpThemeLight === "false";
    if (get("dark", false) !== dark) {
      model.set("dark", dark);
      saver.call();
    }
  };
  const theme = new MutationObserver(tellTheme);
  theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });

  Object.entries(traits).forEach(([name, listener]) => model.on(`change:${name}`, listener));
  Object.entries(events).forEach(([name, listener]) => root.addEventListener(name, listener));
  ups.forEach((name) => window.addEventListener(name, onRelease));
  window.addEventListener("keydown", guard, true);
  el.append(root);
  draw();
  tellTheme();
  return () => {
    theme.disconnect();
    saver.flush();
    cancelAnimationFrame(frame);
    clearTimeout(rest);
    Object.entries(traits).forEach(([name, listener]) => model.off(`change:${name}`, listener));
    ups.forEach((name) => window.removeEventListener(name, onRelease));
    window.removeEventListener("keydown", guard, true);
    root.remove();
  };
}

export default { render };
