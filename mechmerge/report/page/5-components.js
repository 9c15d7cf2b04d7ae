// What is known of a component: its scores, rank, effects and what each recipe takes of it.
const NAMES = { attention: "attention", mlp: "MLP", head: "heads", kv: "KV groups", neuron: "neurons" };
const UNITS = new Set(["head", "kv", "neuron"]);
const nameOf = (kind) => NAMES[kind] ?? kind.replace(".", " ");
const component = (layer, kind, unit) => `L${layer}.${kind}${UNITS.has(kind) ? `.${unit}` : ""}`;
const layerAxis = { axis: "layer", column: (column) => String(column) };
const KEYS = { after: ["after", "after the anchor: 0 by construction"], hatch: ["hatch", "not measured"], dot: ["dot", "really patched"] };

const OTHERS = [
  ["knockout", "knockout"],
  ["activation", "activation patching"],
  ["output", "output: divergence taken away"],
];

/** One kind of a score file: arrays, ranks and what a cell says. */
class Kind {
  constructor(score, kind) {
    Object.assign(this, { score, kind, entry: score.kinds[kind] });
    const shape = (this.entry.screen ?? this.entry.patched).n;
    [this.layers, this.held] = shape;
    this.units = this.entry.units ?? this.held;
    this.patched = values(this.entry.patched);
    this.patchedError = values(this.entry.patched_se);
    this.screen = values(this.entry.screen);
    this.screenError = values(this.entry.screen_se);
    this.others = OTHERS.filter(([field]) => this.entry[field]).map(([field, name]) => ({
      name,
      value: values(this.entry[field]),
      error: values(this.entry[`${field}_se`]),
    }));
    this.roles = values(this.entry.role);
    this.numbers = values(this.entry.unit);
    this.best = new Float32Array(this.layers * this.held).map((_, i) => (this.isPatched(i) ? this.patched[i] : this.screen ? this.screen[i] : NaN));
  }

  /** Whether some were patched and others were not: only then a mark tells anything. */
  get mixed() {
    return this.patched !== null && this.screen !== null && this.best.some((score, i) => Number.isFinite(score) && !this.isPatched(i));
  }

  isPatched(index) {
    return this.patched !== null && Number.isFinite(this.patched[index]);
  }

  index(layer, place) {
    return layer * this.held + place;
  }

  /** The unit's number: places are units unless only the best of each layer are held. */
  unit(layer, place) {
    return this.numbers ? this.numbers[this.index(layer, place)] : place;
  }

  get ranks() {
    this.ranked ??= this.entry.rank ? values(this.entry.rank) : ranksOf(this.best);
    return this.ranked;
  }

  after(layer) {
    return layer >= this.score.anchor;
  }

  /** Knockout, activation patching and output, as far as they were measured. */
  otherLines(index) {
    return this.others
      .filter(({ value }) => Number.isFinite(value[index]))
      .map(({ name, value, error }) => [name, withError(value[index], error?.[index])]);
  }

  roleLines(index) {
    if (!this.roles) return [];
    return [["role", DATA.roles[Number.isFinite(this.roles[index]) ? this.roles[index] : DATA.roles.length - 1]]];
  }

  facts(layer, place) {
    const [index, unit] = [this.index(layer, place), this.unit(layer, place)];
    const lines = [];
    if (this.after(layer)) lines.push(["score", "0 by construction: after the anchor"], ...this.otherLines(index));
    else {
      const patched = this.isPatched(index) ? withError(this.patched[index], this.patchedError?.[index]) : "not patched";
      lines.push(["weight patching", patched]);
      if (this.screen) lines.push(["first-order estimate", withError(this.screen[index], this.screenError?.[index])]);
      lines.push(...this.otherLines(index));
      lines.push(["rank", `${plain(this.ranks[index])} of ${this.entry.count} ${nameOf(this.kind)}`]);
    }
    lines.push(...this.roleLines(index));
    lines.push(...effectLines(this.score.expert, this.kind, layer, unit), ...coefficientLines(this.score.expert, this.kind, layer, unit));
    const name = component(layer, this.kind, unit);
    return { title: name, component: name, lines };
  }
}

function ranksOf(scores) {
  const order = [...scores.keys()].filter((i) => Number.isFinite(scores[i])).sort((a, b) => scores[b] - scores[a]);
  const ranks = new Float32Array(scores.length).fill(NaN);
  order.forEach((index, rank) => (ranks[index] = rank + 1));
  return ranks;
}

/** What a component of an expert does to each behaviour of the effect file. */
function effectLines(digest, kind, layer, unit) {
  const effects = DATA.effects;
  const entry = effects?.kinds[kind];
  const expert = effects?.experts.findIndex((one) => one.digest === digest);
  if (!entry?.effect || expert < 0) return [];
  const [, experts, layers, units] = entry.effect.n;
  const [effect, error] = [values(entry.effect), values(entry.se)];
  return effects.behaviors.map((behavior, b) => {
    const at = ((b * experts + expert) * layers + layer) * units + unit;
    return [`effect on ${behavior.name}`, withError(effect[at], error?.[at])];
  });
}

/** What each recipe takes of a component: its coefficient, or the share of an attention's or MLP's units. */
function coefficientLines(digest, kind, layer, unit) {
  const said = [];
  for (const recipe of DATA.recipes) {
    const expert = recipe.experts.find((one) => one.digest === digest);
    if (!expert) continue;
    const parts = { attention: ["head", "kv"], mlp: ["neuron"] }[kind] ?? [kind];
    const arrays = parts.map((part) => expert.kinds[part]).filter(Boolean);
    if (recipe.instead) said.push([`${recipe.name} takes`, recipe.instead]);
    else if (arrays.length < parts.length) said.push([`${recipe.name} takes`, "not known"]);
    else if (UNITS.has(kind)) said.push([`${recipe.name} takes`, `× ${plain(values(arrays[0])[layer * arrays[0].n[1] + unit])}`]);
    else {
      const rows = arrays.flatMap((array) => [...values(array).subarray(layer * array.n[1], (layer + 1) * array.n[1])]);
      said.push([`${recipe.name} takes`, `${percent(rows.filter((value) => value !== 0).length / rows.length)} of its units`]);
    }
  }
  return said;
}
