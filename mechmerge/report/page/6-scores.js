// Charts of the scores: modules, heads and KV groups, neurons, set curves.

function modules(host) {
  const wanted = DATA.scores.filter((score) => score.kinds.attention?.patched && score.kinds.mlp?.patched);
  for (const unit of new Set(wanted.map((score) => score.unit))) {
    const rows = wanted
      .filter((score) => score.unit === unit)
      .flatMap((score) => ["attention", "mlp"].map((kind) => ({ score, kind, data: new Kind(score, kind) })));
    const place = node("div", { class: "part" });
    host.append(place);
    heatMap(place, {
      label: `Attention and MLP of every behaviour by layer, ${unit}`,
      rows: rows.map(({ score, kind }) => `${score.doubts.length ? "⚠ " : ""}${score.label} · ${kind === "mlp" ? "MLP" : "attn"}`),
      rules: rows.map((_, row) => row).filter((row) => row && row % 2 === 0),
      columns: rows[0].data.layers,
      ...layerAxis,
      colours: "diverging",
      limit: DATA.module_spans[unit],
      unit,
      keys: [KEYS.after],
      value: (row, layer) => rows[row].data.patched[layer],
      after: (row, layer) => rows[row].data.after(layer),
      facts: (row, layer) => {
        const facts = rows[row].data.facts(layer, 0);
        return { ...facts, title: `${rows[row].score.label}: ${facts.title}` };
      },
    });
  }
}

/** One kind of one behaviour: layers from left to right, units from top to bottom. */
function units(host) {
  const score = DATA.scores[Number(host.dataset.score)];
  const data = new Kind(score, host.dataset.kind);
  const { mixed } = data;
  heatMap(host, {
    label: `${score.label}: ${nameOf(data.kind)} by layer`,
    rows: [...Array(data.units).keys()].map((unit) => (UNITS.has(data.kind) ? String(unit) : nameOf(data.kind))),
    columns: data.layers,
    ...layerAxis,
    align: "attention",
    colours: "diverging",
    limit: data.entry.span,
    unit: score.unit,
    keys: [KEYS.after, ...(data.mixed ? [KEYS.dot] : []), ...(data.screen ? [] : [KEYS.hatch])],
    value: (unit, layer) => data.best[data.index(layer, unit)],
    after: (_, layer) => data.after(layer),
    dot: (unit, layer) => mixed && data.isPatched(data.index(layer, unit)),
    facts: (unit, layer) => data.facts(layer, unit),
  });
}

function neurons(host) {
  const score = DATA.scores[Number(host.dataset.score)];
  const data = new Kind(score, "neuron");
  const bins = data.entry.bins;
  const [mean, low, high] = [bins.mean, bins.low, bins.high].map(values);
  const at = (bin, layer) => bin * data.layers + layer;
  const overview = node("div", { class: "part" });
  const picked = node("div", { class: "part" });
  const id = `neurons-${host.dataset.score}`;
  const layers = [...Array(Math.min(score.anchor, data.layers)).keys()];
  const select = node("select", { id }, ...layers.map((layer) => node("option", { value: layer }, `layer ${layer}`)));
  const open = (layer) => {
    select.value = String(layer);
    oneLayer(picked, data, layer);
  };
  select.addEventListener("change", () => open(Number(select.value)));
  host.append(overview, node("p", { class: "control" }, node("label", { for: id }, "Neurons of one layer, one by one: "), select), picked);
  heatMap(overview, {
    label: `${score.label}: neurons by layer, binned by rank`,
    rows: DATA.bins,
    columns: data.layers,
    ...layerAxis,
    align: "attention",
    colours: "diverging",
    limit: Math.max(...[...mean].filter(Number.isFinite).map(Math.abs), 0) || 1,
    root: true,
    unit: `mean of the bin: ${score.unit}; colours by square root`,
    keys: [KEYS.after],
    note: "click a layer to open its neurons",
    value: (bin, layer) => mean[at(bin, layer)],
    after: (_, layer) => data.after(layer),
    activate: (_, layer) => layer < score.anchor && open(layer),
    facts: (bin, layer) => ({
      title: `L${layer}: ${DATA.bins[bin]} of its neurons (${bins.sizes[bin]})`,
      lines: data.after(layer)
        ? [["score", "0 by construction: after the anchor"]]
        : [
            ["mean score", signed(mean[at(bin, layer)])],
            ["range", `${signed(low[at(bin, layer)])} … ${signed(high[at(bin, layer)])}`],
            ...Object.entries(bins.taken).map(([name, taken]) => [`${name} takes`, `${percent(values(taken)[at(bin, layer)])} of them`]),
          ],
    }),
  });
  // The layer with the best neuron is the one to look at first.
  if (layers.length) open(Math.floor(data.ranks.indexOf(1) / data.held));
}

/** All neurons of one layer (or its best, where a page holds no more), in order, and its best ten as a table. */
function oneLayer(host, data, layer) {
  const order = [...Array(data.held).keys()].filter((place) => data.unit(layer, place) < data.units);
  const best = [...order].sort((a, b) => data.best[data.index(layer, b)] - data.best[data.index(layer, a)]).slice(0, 10);
  const some = data.held < data.units ? `the best ${data.held} of ${data.units} neurons` : `${data.units} neurons`;
  const shown = ["weight patching", "first-order estimate", "rank", ...(data.roles ? ["role"] : [])];
  const rows = best.map((place) => {
    const facts = data.facts(layer, place);
    return node("tr", {}, node("th", { scope: "row" }, facts.title), ...shown.map((name) => node("td", {}, new Map(facts.lines).get(name) ?? "–")));
  });
  const head = ["neuron", ...shown].map((name) => node("th", { scope: "col" }, name));
  const map = node("div", { class: "part" });
  const table = node("table", {}, node("caption", {}, node("span", {}, `The best ten of layer ${layer}`)), node("thead", {}, node("tr", {}, ...head)), node("tbody", {}, ...rows));
  host.replaceChildren(map, scrolling(table, `The best ten neurons of layer ${layer}, ${data.score.label}`));
  const { mixed } = data;
  const columns = map.clientWidth && map.clientWidth < 560 ? 32 : 64;
  const cell = (row, column) => row * columns + column;
  heatMap(map, {
    label: `${data.score.label}: ${some} of layer ${layer}`,
    rows: [...Array(Math.ceil(order.length / columns)).keys()].map((row) => (data.numbers ? `from rank ${row * columns + 1}` : String(row * columns))),
    columns,
    column: (column) => (column % 8 ? "" : `+${column}`),
    axis: "neuron",
    colours: "diverging",
    limit: data.entry.span,
    unit: `layer ${layer}, ${some}: ${data.score.unit}`,
    keys: mixed ? [KEYS.dot] : [],
    height: 12,
    value: (row, column) => (cell(row, column) < order.length ? data.best[data.index(layer, cell(row, column))] : undefined),
    dot: (row, column) => mixed && data.isPatched(data.index(layer, cell(row, column))),
    facts: (row, column) =>
      cell(row, column) < order.length ? data.facts(layer, cell(row, column)) : { title: "no neuron", lines: [] },
  });
}

function scrolling(table, label) {
  return node("div", { class: "scroll", role: "region", "aria-label": label, tabindex: "0" }, table);
}

function setCurves(host) {
  const score = DATA.scores[Number(host.dataset.score)];
  curves(host, score.label, score.curves);
}
