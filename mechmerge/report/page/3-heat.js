// Heat maps: cells on a canvas, names in SVG, and one cursor for mouse, touch and keyboard.
const NARROWEST = 6;
const AXIS = 20;

/**
 * Draws a heat map into a host.
 *
 * chart: {label, rows: [names], columns, column(c) → name or "" (a tick), axis, value(r, c), facts(r, c), limit,
 *   colours: diverging | sequential, root: whether colours follow the square root, unit, after?(r, c): grey, dot?(r, c),
 *   rules?: rows that begin with a line, activate?, note?, height?: pixels of a row, keys?: [[class, text]],
 *   align?: a text whose width the names get at least, so that maps below each other line up}
 */
function heatMap(host, chart) {
  const surface = node("div", { class: "heat" });
  const scroller = node("div", { class: "plot-scroll" }, surface);
  const canvas = node("canvas", { "aria-hidden": "true" });
  const legend = node("div", { class: "legend" });
  let geometry = null;
  const view = () => geometry && ({
    rows: chart.rows.length,
    columns: chart.columns,
    start: [0, 0],
    at(x, y) {
      const row = Math.floor(y / geometry.height);
      const column = Math.floor((x - geometry.left) / geometry.width);
      return row >= 0 && row < chart.rows.length && column >= 0 && column < chart.columns ? [row, column] : null;
    },
    box: (row, column) => ({
      x: geometry.left + column * geometry.width,
      y: row * geometry.height,
      width: geometry.width,
      height: geometry.height,
    }),
    facts: chart.facts,
    activate: chart.activate,
  });
  const pointer = pointing(surface, chart.label, view);
  host.append(scroller, legend, pointer.readout);
  responsive(surface.parentElement, (room) => {
    const widest = Math.max(...chart.rows.map(textWidth), textWidth(chart.axis), textWidth(chart.align ?? ""));
    const names = Math.min(widest + 10, 0.38 * room);
    const width = Math.min(Math.max((room - names - 2) / chart.columns, NARROWEST), 40);
    const height = chart.height ?? (chart.rows.length > 12 ? 14 : 18);
    geometry = { left: names, width, height };
    const size = { width: names + width * chart.columns + 2, height: height * chart.rows.length };
    surface.style.width = `${size.width}px`;
    surface.style.height = `${size.height + AXIS}px`;
    paint(canvas, chart, geometry, size);
    surface.replaceChildren(canvas, frame(chart, geometry, size));
    legend.replaceChildren(...key(chart));
    pointer.refresh();
    // A region that scrolls must be reachable by keyboard: the surface inside is.
    scroller.classList.toggle("wide", size.width > room);
  });
}

const position = (chart, value) => {
  const share = value / chart.limit;
  const bent = chart.root ? Math.sign(share) * Math.sqrt(Math.abs(share)) : share;
  return chart.colours === "sequential" ? bent : 0.5 + bent / 2;
};

function paint(canvas, chart, { left, width, height }, size) {
  const sharp = devicePixelRatio || 1;
  canvas.width = Math.ceil(size.width * sharp);
  canvas.height = Math.ceil(size.height * sharp);
  canvas.style.width = `${size.width}px`;
  canvas.style.height = `${size.height}px`;
  const context = canvas.getContext("2d");
  context.scale(sharp, sharp);
  const [grey, hatch, paper, ink] = ["after", "hatch", "paper", "ink"].map(colour);
  const gap = width >= 10 && height >= 10 ? 1 : 0;
  for (let row = 0; row < chart.rows.length; row++) {
    for (let column = 0; column < chart.columns; column++) {
      const [x, y] = [Math.round(left + column * width), Math.round(row * height)];
      const [w, h] = [Math.round(left + (column + 1) * width) - x - gap, Math.round((row + 1) * height) - y - gap];
      const value = chart.value(row, column);
      if (value === undefined) continue;
      if (chart.after?.(row, column)) context.fillStyle = grey;
      else if (Number.isFinite(value)) context.fillStyle = onScale(chart.colours, position(chart, value));
      else {
        hatched(context, x, y, w, h, hatch);
        continue;
      }
      context.fillRect(x, y, w, h);
      if (chart.dot?.(row, column)) {
        context.beginPath();
        context.arc(x + w / 2, y + h / 2, Math.min(w, h, 12) / 4, 0, 7);
        context.fillStyle = paper;
        context.fill();
        context.strokeStyle = ink;
        context.stroke();
      }
    }
  }
}

function hatched(context, x, y, width, height, ink) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.strokeStyle = ink;
  context.lineWidth = 0.8;
  context.beginPath();
  for (let at = -height; at < width; at += 5) {
    context.moveTo(x + at, y + height);
    context.lineTo(x + at + height, y);
  }
  context.stroke();
  context.restore();
}

function frame(chart, { left, width, height }, size) {
  const made = node("svg", {
    "aria-hidden": "true",
    width: size.width,
    height: size.height + AXIS,
    viewBox: `0 0 ${size.width} ${size.height + AXIS}`,
  });
  // Where rows are thin, every other name would touch the next one.
  const step = Math.ceil(15 / height);
  chart.rows.forEach((name, row) => {
    if (row % step) return;
    made.append(node("text", { x: left - 6, y: (row + 0.5) * height + 4, "text-anchor": "end" }, fitted(name, left - 8)));
  });
  for (const row of chart.rules ?? []) {
    made.append(node("line", { x1: 0, x2: size.width, y1: row * height - 0.5, y2: row * height - 0.5, class: "rule" }));
  }
  const ticks = [...Array(chart.columns).keys()].filter((column) => chart.column(column) !== "");
  const every = Math.ceil(26 / width);
  for (const column of ticks.filter((_, at) => at % every === 0)) {
    const x = left + (column + 0.5) * width;
    made.append(node("text", { x, y: size.height + 14, "text-anchor": "middle" }, chart.column(column)));
  }
  if (textWidth(chart.axis) < left - 8) {
    made.append(node("text", { x: left - 6, y: size.height + 14, "text-anchor": "end", class: "quiet" }, chart.axis));
  }
  return made;
}

/** Whether some value lies beyond the scale's end: a few outliers do not wash out the rest. */
function beyond(chart, sign) {
  for (let row = 0; row < chart.rows.length; row++) {
    for (let column = 0; column < chart.columns; column++) {
      if (sign * chart.value(row, column) > 1.0001 * chart.limit && !chart.after?.(row, column)) return true;
    }
  }
  return false;
}

/** The parts of a legend: the colour bar with its ends and unit, then what the other marks mean. */
function key(chart) {
  const bar = node("canvas", { class: "bar", width: 120, height: 1, "aria-hidden": "true" });
  const context = bar.getContext("2d");
  for (let x = 0; x < 120; x++) {
    const place = chart.colours === "sequential" ? x / 119 : (2 * x) / 119 - 1;
    const bent = chart.root ? Math.sign(place) * place * place : place;
    context.fillStyle = onScale(chart.colours, position(chart, bent * chart.limit));
    context.fillRect(x, 0, 1, 1);
  }
  const sequential = chart.colours === "sequential";
  const low = sequential ? "0" : (beyond(chart, -1) ? "≤ " : "") + signed(-chart.limit);
  const high = sequential ? percent(chart.limit) : (beyond(chart, 1) ? "≥ " : "") + signed(chart.limit);
  const parts = [node("span", { class: "scale" }, low, bar, high), node("span", {}, chart.unit)];
  for (const [mark, text] of chart.keys ?? []) {
    parts.push(node("span", {}, node("i", { class: `mark ${mark}`, "aria-hidden": "true" }), text));
  }
  if (chart.note) parts.push(node("span", {}, chart.note));
  return parts;
}
