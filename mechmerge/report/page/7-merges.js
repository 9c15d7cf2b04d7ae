// Charts of effects, recipes and the evaluation.

function effects(host) {
  const { behaviors, experts, kinds, span } = DATA.effects;
  const names = Object.keys(kinds);
  const grid = node("div", { class: "panels wide" });
  const opened = node("div", { class: "part" });
  host.append(grid, opened);
  for (const [b, behavior] of behaviors.entries()) {
    for (const [e, expert] of experts.entries()) {
      const own = behavior.expert === expert.name ? " (its own)" : "";
      const title = `on ${behavior.name}, of ${expert.name}${own}${behavior.doubtful ? " ⚠ anchor not valid" : ""}`;
      const place = node("div", { class: "panel" }, node("h3", {}, title));
      grid.append(place);
      const layers = kinds[names[0]].sum.n[2];
      const at = (layer) => (b * experts.length + e) * layers + layer;
      heatMap(place, {
        label: `Effect ${title}, by kind and layer`,
        rows: names.map(nameOf),
        columns: layers,
        ...layerAxis,
        colours: "diverging",
        limit: span,
        root: true,
        unit: `${DATA.effects.unit}; positive helps; colours by square root`,
        note: "click to open single components",
        value: (row, layer) => values(kinds[names[row]].sum)[at(layer)],
        activate: (row, layer) => kinds[names[row]].effect && oneEffect(opened, b, e, names[row], layer),
        facts: (row, layer) => {
          const kind = kinds[names[row]];
          return {
            title: `L${layer}: ${nameOf(names[row])} ${title}`,
            lines: [
              ["sum of effects", signed(values(kind.sum)[at(layer)])],
              ["components", String(kind.units)],
              ["of them hurt", percent(values(kind.hurt)[at(layer)])],
            ],
          };
        },
      });
    }
  }
}

/** The effects of the single components of one kind and layer. */
function oneEffect(host, b, e, kind, layer) {
  const { behaviors, experts, kinds } = DATA.effects;
  const [, , layers, count] = kinds[kind].effect.n;
  const start = ((b * experts.length + e) * layers + layer) * count;
  const effect = values(kinds[kind].effect).subarray(start, start + count);
  const map = node("div", { class: "part" });
  const title = `${nameOf(kind)} of layer ${layer}: effect on ${behaviors[b].name}, of ${experts[e].name}`;
  host.replaceChildren(node("h3", {}, title), map);
  const columns = Math.min(count, host.clientWidth < 560 ? 32 : 64);
  const cell = (row, column) => row * columns + column;
  heatMap(map, {
    label: title,
    rows: [...Array(Math.ceil(count / columns)).keys()].map((row) => String(row * columns)),
    columns,
    column: (column) => (columns > 16 && column % 8 ? "" : `+${column}`),
    axis: kind,
    colours: "diverging",
    limit: Math.max(...effect.map(Math.abs)) || 1,
    unit: `${DATA.effects.unit}; positive helps`,
    height: count > 64 ? 12 : 18,
    value: (row, column) => (cell(row, column) < count ? effect[cell(row, column)] : undefined),
    facts: (row, column) => {
      const unit = cell(row, column);
      if (unit >= count) return { title: "no component", lines: [] };
      const digest = experts[e].digest;
      const lines = [...effectLines(digest, kind, layer, unit), ...coefficientLines(digest, kind, layer, unit)];
      const name = component(layer, kind, unit);
      return { title: `${name} of ${experts[e].name}`, component: name, lines };
    },
  });
  host.scrollIntoView({ block: "nearest" });
}

/** What one recipe, chosen by the reader, takes of each expert by kind and layer. */
function recipes(host) {
  const known = DATA.recipes.filter((recipe) => recipe.experts.some((expert) => Object.keys(expert.kinds).length));
  if (!known.length) return;
  const select = node("select", { id: "recipe" }, ...known.map((recipe, at) => node("option", { value: at }, recipe.name)));
  const place = node("div", { class: "panels wide" });
  host.append(node("p", { class: "control" }, node("label", { for: "recipe" }, "Recipe: "), select), place);
  const draw = () => {
    place.replaceChildren();
    const recipe = known[Number(select.value)];
    for (const expert of recipe.experts) {
      const panel = node("div", { class: "panel" }, node("h3", {}, `${recipe.name}: what it takes of ${expert.name}`));
      place.append(panel);
      shares(panel, recipe, expert);
    }
  };
  select.addEventListener("change", draw);
  select.value = String(Math.max(known.findIndex((recipe) => recipe.published), 0));
  draw();
}

function shares(host, recipe, expert) {
  const kinds = Object.keys(expert.kinds);
  const row = (kind, layer) => {
    const { n } = expert.kinds[kind];
    return values(expert.kinds[kind]).subarray(layer * n[1], (layer + 1) * n[1]);
  };
  const taken = (kind, layer) => row(kind, layer).filter((value) => value !== 0).length;
  heatMap(host, {
    label: `${recipe.name}: share of the units of ${expert.name} that it takes, by kind and layer`,
    rows: kinds.map(nameOf),
    columns: expert.kinds[kinds[0]].n[0],
    ...layerAxis,
    colours: "sequential",
    limit: 1,
    unit: "share of units with a coefficient other than 0",
    value: (at, layer) => taken(kinds[at], layer) / expert.kinds[kinds[at]].n[1],
    facts: (at, layer) => {
      const all = row(kinds[at], layer);
      const mean = all.reduce((sum, value) => sum + value, 0) / all.length;
      const count = taken(kinds[at], layer);
      return {
        title: `L${layer}: ${nameOf(kinds[at])} of ${expert.name}`,
        lines: [
          ["taken", `${count} of ${all.length} (${percent(count / all.length)})`],
          ["mean coefficient", plain(mean)],
        ],
      };
    },
  });
}

// --------------------------------------------------------------------------------------------------------------- evaluation
function evaluation(host) {
  const { metrics, models } = DATA.evaluation;
  const grid = node("div", { class: "panels wide" });
  host.append(grid);
  for (const metric of metrics) {
    const there = models.filter((model) => model.values[metric.name]);
    const rows = there.map((model) => {
      const [value, low, high] = model.values[metric.name];
      const mark = { parent: "parent", published: "strong" }[model.role] ?? "plain";
      const lines = [
        [metric.name, value.toFixed(3)],
        ["95 % interval", `${low.toFixed(3)} … ${high.toFixed(3)}`],
        ["n", String(metric.n)],
      ];
      return { name: model.name, value, low, high, mark, facts: { title: model.name, lines } };
    });
    const lines = there.filter((model) => model.role === "parent").map((model) => model.values[metric.name][0]);
    const place = node("div", { class: "panel" }, node("h3", {}, `${metric.name} (n = ${metric.n})`));
    grid.append(place);
    forest(place, { label: `${metric.name} of every model with 95 % intervals`, rows, low: 0, high: 1, lines, difference: false });
  }
  const keys = [
    ["square", "parent (dashed lines)"],
    ["diamond", "the published merge"],
    ["circle", "other merges"],
  ];
  host.append(
    node("div", { class: "legend" }, ...keys.map(([mark, text]) => node("span", {}, node("i", { class: `mark ${mark}`, "aria-hidden": "true" }), text))),
  );
}

/** A merge's headline differences, a forest plot for each parent. */
function differences(host) {
  const pairs = DATA.evaluation.pairs.filter((pair) => pair.model === host.dataset.model && pair.headline);
  if (!pairs.length) return;
  const ends = pairs.flatMap((pair) => pair.values);
  const [low, high] = [Math.min(0, ...ends), Math.max(0, ...ends)];
  const edge = (high - low) * 0.04 || 0.1;
  const grid = node("div", { class: "panels" });
  host.append(grid);
  for (const against of new Set(pairs.map((pair) => pair.against))) {
    const rows = pairs
      .filter((pair) => pair.against === against)
      .map((pair) => {
        const [value, lower, upper] = pair.values;
        const mark = { "▼": "worse", "▲": "better" }[pair.verdict[0]] ?? "plain";
        const lines = [
          ["difference", signed(value)],
          ["95 % interval", `${signed(lower)} … ${signed(upper)}`],
          ["verdict", pair.verdict],
        ];
        return { name: pair.metric, value, low: lower, high: upper, mark, facts: { title: `${pair.metric} against ${against}`, lines } };
      });
    const place = node("div", { class: "panel" }, node("h4", {}, `${host.dataset.model} − ${against}`));
    grid.append(place);
    const label = `${host.dataset.model} minus ${against} with 95 % intervals`;
    forest(place, { label, rows, low: low - edge, high: high + edge, lines: [0], difference: true });
  }
}
