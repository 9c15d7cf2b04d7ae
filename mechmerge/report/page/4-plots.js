// Forest plots (values or differences with their intervals) and set curves.

/** A round step that cuts a span into three to six parts. */
function niceStep(span) {
  const power = 10 ** Math.floor(Math.log10(span / 4));
  return [1, 2, 2.5, 5, 10].map((n) => n * power).find((step) => span / step <= 6);
}

function ticksOf(low, high) {
  const step = niceStep(high - low);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + 1e-9 * step; at++) found.push(at * step);
  return found;
}

/**
 * A forest plot.
 *
 * chart: {label, title, rows: [{name, value, low, high, mark: plain | strong | parent | better | worse, facts}], low, high: the
 *   axis' ends, lines: [values that get a dashed line], difference: whether values carry a sign}
 */
function forest(host, chart) {
  const surface = node("div", { class: "forest" });
  const ROW = 24;
  let geometry = null;
  const view = () => geometry && ({
    rows: chart.rows.length,
    columns: 1,
    start: [0, 0],
    at(x, y) {
      const row = Math.floor(y / ROW);
      return row >= 0 && row < chart.rows.length ? [row, 0] : null;
    },
    box: (row) => ({ x: 0, y: row * ROW, width: geometry.room, height: ROW }),
    facts: (row) => chart.rows[row].facts,
  });
  const pointer = pointing(surface, chart.label, view);
  host.append(surface, pointer.readout);
  responsive(host, (room) => {
    const names = Math.min(Math.max(...chart.rows.map((row) => textWidth(row.name))) + 12, 0.46 * room);
    const right = 48;
    const height = chart.rows.length * ROW;
    const x = (value) => names + ((value - chart.low) / (chart.high - chart.low)) * (room - names - right);
    geometry = { room };
    const made = node("svg", { "aria-hidden": "true", width: room, height: height + 22, viewBox: `0 0 ${room} ${height + 22}` });
    const print = (value) => (chart.difference ? signed(Number(value.toFixed(6))) : String(Number(value.toFixed(6))));
    const ticks = ticksOf(chart.low, chart.high);
    const step = ticks[1] - ticks[0];
    const every = Math.ceil((Math.max(...ticks.map((tick) => textWidth(print(tick)))) + 8) / (x(step) - x(0)));
    for (const tick of ticks) {
      made.append(node("line", { x1: x(tick), x2: x(tick), y1: 0, y2: height, class: "grid" }));
      // Counted from 0, so that 0 keeps its label.
      if (Math.round(tick / step) % every) continue;
      made.append(node("text", { x: x(tick), y: height + 16, "text-anchor": "middle", class: "quiet" }, print(tick)));
    }
    for (const value of chart.lines) {
      made.append(node("line", { x1: x(value), x2: x(value), y1: 0, y2: height, class: "reference" }));
    }
    chart.rows.forEach((row, number) => {
      const y = (number + 0.5) * ROW;
      const strong = row.mark === "strong" ? "strong" : "";
      made.append(node("text", { x: names - 8, y: y + 4, "text-anchor": "end", class: strong }, fitted(row.name, names - 10)));
      made.append(node("line", { x1: x(row.low), x2: x(row.high), y1: y, y2: y, class: `interval ${row.mark}` }));
      made.append(pointMark(row.mark, x(row.value), y));
      const said = `${chart.difference ? (row.value < 0 ? "−" : "+") : ""}${Math.abs(row.value).toFixed(2)}`;
      made.append(node("text", { x: room - 2, y: y + 4, "text-anchor": "end", class: strong }, said));
    });
    surface.style.height = `${height + 22}px`;
    surface.replaceChildren(made);
    pointer.refresh();
  });
}

/** Marks differ in shape, not in colour alone: up for better, down for worse, a diamond for the published merge. */
function pointMark(mark, x, y) {
  const shapes = {
    better: `${x - 5},${y + 4} ${x + 5},${y + 4} ${x},${y - 6}`,
    worse: `${x - 5},${y - 4} ${x + 5},${y - 4} ${x},${y + 6}`,
    strong: `${x - 6},${y} ${x},${y - 6} ${x + 6},${y} ${x},${y + 6}`,
    parent: `${x - 4},${y - 4} ${x + 4},${y - 4} ${x + 4},${y + 4} ${x - 4},${y + 4}`,
  };
  if (shapes[mark]) return node("polygon", { points: shapes[mark], class: `point ${mark}` });
  return node("circle", { cx: x, cy: y, r: 4.5, class: `point ${mark}` });
}

const ORDERS = { score: "by score", random: "random sets", magnitude: "largest deltas" };

/** Set curves of one localization: a panel for each measure. */
function curves(host, label, found) {
  const grid = node("div", { class: "panels" });
  const entries = Object.entries(ORDERS).map(([order, name]) =>
    node("span", {}, node("i", { class: `mark line ${order}`, "aria-hidden": "true" }), order === "random" ? randomName(found) : name),
  );
  host.append(node("div", { class: "legend" }, ...entries), grid);
  for (const panel of found.panels) {
    const place = node("div", { class: "panel" }, node("h5", {}, panel.name));
    grid.append(place);
    curvePanel(place, `${label}: ${panel.name} by share of components moved`, panel);
  }
}

const randomName = (found) => `${ORDERS.random}: mean and range of ${found.seeds}`;

function curvePanel(host, label, panel) {
  const surface = node("div", { class: "curve" });
  const [LEFT, RIGHT, TOP, HEIGHT, BOTTOM] = [46, 8, 8, 170, 36];
  const shares = [...new Set(panel.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const all = panel.lines.flatMap((line) => [...line.low, ...line.high, 0]);
  const [lowest, highest] = [Math.min(...all), Math.max(...all)];
  const step = niceStep(highest - lowest || 1);
  const [low, high] = [Math.floor(lowest / step) * step, Math.ceil(highest / step) * step || step];
  let x = null;
  const y = (value) => TOP + ((high - value) / (high - low)) * HEIGHT;
  const view = () => x && ({
    rows: 1,
    columns: shares.length,
    start: [0, 0],
    at(px) {
      const distances = shares.map((share) => Math.abs(x(share) - px));
      return [0, distances.indexOf(Math.min(...distances))];
    },
    box: (_, column) => ({ x: x(shares[column]) - 3, y: TOP, width: 6, height: HEIGHT }),
    facts: (_, column) => ({
      title: `${percent(shares[column])} of the components`,
      lines: panel.lines.map((line) => [ORDERS[line.order], curveValue(line, shares[column])]),
    }),
  });
  const pointer = pointing(surface, label, view);
  host.append(surface, pointer.readout);
  responsive(host, (room) => {
    x = (share) => LEFT + share * (room - LEFT - RIGHT);
    const size = { width: room, height: TOP + HEIGHT + BOTTOM };
    const made = node("svg", { "aria-hidden": "true", ...size, viewBox: `0 0 ${size.width} ${size.height}` });
    for (const tick of ticksOf(low, high)) {
      made.append(node("line", { x1: LEFT, x2: room - RIGHT, y1: y(tick), y2: y(tick), class: "grid" }));
      const said = (tick < 0 ? "−" : "") + plain(Math.abs(tick) < 1e-12 ? 0 : Math.abs(tick));
      made.append(node("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end", class: "quiet" }, said));
    }
    for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
      const anchor = tick === 1 ? "end" : "middle";
      made.append(node("text", { x: x(tick), y: TOP + HEIGHT + 16, "text-anchor": anchor, class: "quiet" }, percent(tick)));
    }
    const axis = "share of components moved";
    made.append(node("text", { x: LEFT, y: TOP + HEIGHT + 32, class: "quiet" }, axis));
    for (const line of [...panel.lines].reverse()) {
      if (line.order === "random") {
        const there = line.x.map((share, at) => [x(share), y(line.high[at])]);
        const back = line.x.map((share, at) => [x(share), y(line.low[at])]).reverse();
        made.append(node("polygon", { points: [...there, ...back].map((p) => p.join(",")).join(" "), class: "band" }));
      }
      const path = line.x.map((share, at) => `${at ? "L" : "M"}${x(share)} ${y(line.y[at])}`).join("");
      made.append(node("path", { d: path, class: `curve-line ${line.order}` }));
      line.x.forEach((share, at) => made.append(node("circle", { cx: x(share), cy: y(line.y[at]), r: 2.6, class: `dot ${line.order}` })));
    }
    surface.style.height = `${size.height}px`;
    surface.replaceChildren(made);
    pointer.refresh();
  });
}

function curveValue(line, share) {
  const at = line.x.indexOf(share);
  if (at < 0) return "not measured";
  const range = line.order === "random" ? ` (${signed(line.low[at])} … ${signed(line.high[at])})` : "";
  return signed(line.y[at]) + range;
}
