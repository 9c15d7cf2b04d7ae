// Small helpers: elements, numbers, packed arrays (mechmerge/report/pack.py says how they are packed) and the theme.
const SVG = new Set(["svg", "g", "rect", "line", "path", "text", "circle", "polygon", "title"]);

/** An element with attributes and children. Texts become text nodes: nothing from the data is ever parsed as markup. */
function node(tag, attributes = {}, ...children) {
  const made = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// ------------------------------------------------------------------------------------------------------------------ numbers
const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

/** A number that is not negative, to three significant digits. */
function plain(value) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  if (value >= 1000) return String(Math.round(value));
  if (value >= 0.0001) return String(Number(value.toPrecision(3)));
  const [digits, power] = value.toExponential(1).split("e");
  return `${digits}×10${[...String(Number(power))].map((c) => SUPERSCRIPTS[c]).join("")}`;
}

/** A number with its sign, with a real minus. */
function signed(value) {
  if (!Number.isFinite(value)) return "–";
  return (value > 0 ? "+" : value < 0 ? "−" : "") + plain(Math.abs(value));
}

const percent = (value) => (Number.isFinite(value) ? `${Math.round(100 * value)} %` : "–");
const withError = (value, error) => (Number.isFinite(error) ? `${signed(value)} ± ${plain(error)}` : signed(value));

// ------------------------------------------------------------------------------------------------------------ packed arrays
const decoded = new WeakMap();

/** The Float32Array of a packed array; null for none. */
function values(packed) {
  if (!packed) return null;
  if (!decoded.has(packed)) decoded.set(packed, unpack(packed));
  return decoded.get(packed);
}

function unpack(packed) {
  const size = packed.n.reduce((product, n) => product * n, 1);
  if (packed.t === "const") return new Float32Array(size).fill(packed.d);
  const found = new Float32Array(size);
  if (packed.t === "few") {
    found.fill(NaN);
    for (const [index, value] of packed.d) found[index] = value;
    return found;
  }
  const text = atob(packed.d);
  if (packed.t === "bits") {
    for (let i = 0; i < size; i++) found[i] = (text.charCodeAt(i >> 3) >> (i & 7)) & 1;
    return found;
  }
  const width = { f32: 4, f24: 3, b16: 2 }[packed.t];
  const raw = new Uint32Array(found.buffer);
  for (let i = 0; i < size; i++) {
    let bits = 0;
    for (let byte = 0; byte < width; byte++) bits |= text.charCodeAt(i * width + byte) << (8 * byte);
    raw[i] = bits << (32 - 8 * width);
  }
  return found;
}

// -------------------------------------------------------------------------------------------------------------------- theme
const darkSystem = matchMedia("(prefers-color-scheme: dark)");
const themed = new Set();

/** Whether the page is dark now: the reader's choice, else the system's. */
function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : darkSystem.matches;
}

/** The value of one of the style sheet's colours. */
function colour(name) {
  const probe = document.getElementById("probe");
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

/** One remembered setting; a page opened from a file may have no storage. */
function remembered(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(key);
    localStorage.setItem(key, value);
  } catch {
    // No storage: the choice holds until the page is closed.
  }
  return null;
}

function setUpTheme() {
  const button = document.getElementById("theme");
  const apply = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    button.textContent = isDark() ? "Light theme" : "Dark theme";
    themed.forEach((draw) => draw());
  };
  const before = remembered("mechmerge-theme");
  apply(before === "light" || before === "dark" ? before : "");
  button.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    remembered("mechmerge-theme", theme);
    apply(theme);
  });
  darkSystem.addEventListener("change", () => apply(""));
  button.hidden = false;
}

// ------------------------------------------------------------------------------------------------------------------ colours
const SCALES = {
  // Brewer's RdBu, reversed as in the figures: red is positive. In the dark the middle is dark, so that 0 stays quiet.
  diverging: [
    ["#2166ac", "#92c5de", "#f4f4f4", "#f4a582", "#b2182b"],
    ["#6cb6ff", "#2f5f8f", "#252a33", "#95453c", "#ff8a73"],
  ],
  sequential: [
    ["#f2f3f5", "#9ecae1", "#2171b5", "#08306b"],
    ["#252a33", "#2b5583", "#5a9be0", "#cfe6ff"],
  ],
};

/** The colour of a position 0 … 1 on a scale. */
function onScale(name, position) {
  const stops = SCALES[name][isDark() ? 1 : 0];
  const place = Math.min(Math.max(position, 0), 1) * (stops.length - 1);
  const first = Math.min(Math.floor(place), stops.length - 2);
  const part = (stop, at) => parseInt(stop.slice(1 + 2 * at, 3 + 2 * at), 16);
  const mixed = [0, 1, 2].map((at) => {
    const [low, high] = [part(stops[first], at), part(stops[first + 1], at)];
    return Math.round(low + (high - low) * (place - first));
  });
  return `rgb(${mixed.join(",")})`;
}
