// Sensitivity curves: accuracy with one layer cut alone, against the share that is cut, behind the row's ratio slider.
// All rows share one scale, so that rows compare. Joined with desk_base.js, desk_parts.js and desk.js.

const LEAST_RANGE = 0.05; // of accuracy: losses smaller than this look small, however small all of them are

/** The height of an accuracy: the best of all rows on top, the worst of all rows at the bottom. */
function heightOf({ most, least }, accuracy) {
  const range = Math.max(most - least, LEAST_RANGE);
  return (3 + (94 * (most - accuracy)) / range).toFixed(2);
}

/** Points [share gone, accuracy] from share `from` to share `to`, with one put in at either end. */
function between(points, from, to) {
  const at = (share) => {
    const next = points.findIndex((point) => point[0] >= share);
    if (next <= 0) return [share, points[next < 0 ? points.length - 1 : 0][1]];
    const [[x0, y0], [x1, y1]] = [points[next - 1], points[next]];
    return [share, y0 + ((y1 - y0) * (share - x0)) / (x1 - x0 || 1)];
  };
  return [at(from), ...points.filter(([share]) => share > from && share < to), at(to)];
}

/** A curve in two halves: what the setting removes in grey, what is left in the accent colour. */
function makeCurve() {
  const paths = ["removed", "kept"].map((side) => ({
    area: h("path", { class: `pl-curve-area pl-area-${side}` }),
    line: h("path", { class: `pl-curve-line pl-area-${side}` }),
  }));
  const box = { class: "pl-curve", viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img" };
  const node = h("svg", box, ...paths.flatMap(({ area, line }) => [area, line]));

  const draw = (scale, points, cut, most) => {
    const last = points[points.length - 1][0];
    [[0, Math.min(cut, last)], [Math.min(cut, last), last]].forEach(([from, to], side) => {
      const shown = to > from ? between(points, from, to) : [];
      const x = (share) => ((100 * share) / most).toFixed(2);
      const line = shown.map(([share, accuracy]) => `${x(share)} ${heightOf(scale, accuracy)}`).join("L");
      setAttribute(paths[side].line, "d", line ? `M${line}` : "");
      const area = line ? `M${x(from)} 100L${line}L${x(to)} 100Z` : "";
      setAttribute(paths[side].area, "d", area);
    });
  };
  /** The row's curve, cut at a share, along a slider that goes up to a share; gives the words for it. */
  const update = (curves, row, cut, largest) => {
    const measured = row.channels > 1 && curves.layers?.[row.name];
    node.classList.toggle("pl-stale", Boolean(curves.stale));
    setAttribute(node, "visibility", measured ? null : "hidden");
    if (!measured) return "";
    draw(curves, [[0, curves.base], ...measured], cut, largest);
    const words = curveWords(curves, measured);
    setAttribute(node, "aria-label", words);
    return words;
  };
  return { node, update };
}

/** For those who cannot see the curve: its measured point that is nearest to the cut. */
function aloneWords(curves, row, cut) {
  const measured = cut > 0 && curves.layers?.[row.name];
  if (!measured) return "";
  const far = ([share]) => Math.abs(share - cut);
  const near = measured.reduce((best, point) => (far(point) < far(best) ? point : best));
  return `; alone, accuracy ${plain(100 * near[1], 1)} % with ${percent(near[0])} removed${curves.stale ? ", stale" : ""}`;
}

/** The numbers of a curve, a line each. */
function curveWords({ base, n, precision, stale }, measured) {
  const one = ([share, accuracy, change, half]) =>
    `${percent(share)} removed: ${plain(100 * accuracy, 1)} (${signed(100 * change, 1)} ± ${plain(100 * half, 1)})`;
  const old = stale ? ` Stale: measured ${stale}.` : "";
  const head = `Accuracy with this layer cut alone, n = ${count(n)}, ${precision}.${old}`;
  return [head, `none removed: ${plain(100 * base, 1)}`, ...measured.map(one)].join("\n");
}

/** What the column of curves says above them. */
function setCurveHead(head, [, label, help], { layers, most, least, stale }) {
  setText(head, !layers ? label : stale ? `${label}, stale scan` : `${label}, accuracy`);
  const range = layers ? [most, Math.min(least, most - LEAST_RANGE)].map((value) => plain(100 * value, 1)) : [];
  const scale = `Behind it: accuracy with the layer cut alone, from ${range[0]} at the top to ${range[1]} at the bottom`;
  setAttribute(head, "title", !layers ? help : `${help}. ${scale}${stale ? `; stale: measured ${stale}` : ""}`);
}
