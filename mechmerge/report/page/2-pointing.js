// What all charts share: drawing at the width that is there, and pointing at a mark by mouse, touch or keyboard.
const tip = document.getElementById("tip");

/** Calls draw(width) once the host has a width, and again when it or the theme changes. */
function responsive(host, draw) {
  let width = 0;
  const redraw = () => width > 0 && draw(width);
  themed.add(redraw);
  new ResizeObserver((entries) => {
    const found = Math.floor(entries[0].contentRect.width);
    if (found === width) return;
    width = found;
    redraw();
  }).observe(host);
}

/** Fills and places the tooltip beside a box of the viewport. */
function showTip(facts, box) {
  const rows = facts.lines.flatMap(([name, value]) => [node("dt", {}, name), node("dd", {}, value)]);
  tip.replaceChildren(node("strong", {}, facts.title), node("dl", {}, ...rows));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const room = document.documentElement.clientWidth;
  const left = Math.min(Math.max(box.left + box.width / 2 - width / 2, 6), room - width - 6);
  const above = box.top - height - 8;
  tip.style.left = `${Math.max(left, 0)}px`;
  tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
}

const hideTip = () => {
  tip.hidden = true;
};
addEventListener("scroll", hideTip, { passive: true });
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());

/**
 * Makes a drawn surface answer to mouse, touch and keyboard.
 *
 * The surface takes the focus; arrows move a cursor, Home and End go to a row's ends, Enter activates, Escape hides the tooltip.
 * `view()` gives the current drawing: {rows, columns, start: [row, column], at(x, y) → [row, column] | null,
 * box(row, column) → {x, y, width, height}, facts(row, column) → {title, lines, component?}, activate?(row, column)}, in the
 * surface's pixels; null before the first drawing. A mark that stands for one component also sends the event `choose` with its
 * name when it is clicked or entered.
 */
function pointing(surface, label, view) {
  const cursor = node("div", { class: "cursor", hidden: true });
  const readout = node("p", { class: "readout", "aria-live": "polite" });
  surface.setAttribute("tabindex", "0");
  surface.setAttribute("role", "application");
  surface.setAttribute("aria-roledescription", "chart");
  surface.setAttribute("aria-label", `${label}. Arrow keys move from mark to mark.`);
  surface.append(cursor);
  let held = null;
  const place = ([row, column]) => {
    const box = view().box(row, column);
    Object.assign(cursor.style, {
      left: `${box.x - 1}px`,
      top: `${box.y - 1}px`,
      width: `${box.width + 2}px`,
      height: `${box.height + 2}px`,
    });
    cursor.hidden = false;
  };
  const show = (cell) => {
    place(cell);
    showTip(view().facts(...cell), cursor.getBoundingClientRect());
  };
  const say = (cell) => {
    const facts = view().facts(...cell);
    readout.textContent = `${facts.title}: ${facts.lines.map((line) => line.join(" ")).join("; ")}`;
  };
  const under = (event) => {
    const box = surface.getBoundingClientRect();
    return view()?.at(event.clientX - box.left, event.clientY - box.top);
  };
  const settle = (cell) => {
    held = cell;
    show(cell);
    say(cell);
  };
  const activate = (cell) => {
    view().activate?.(...cell);
    const { component } = view().facts(...cell);
    if (component) surface.dispatchEvent(new CustomEvent("choose", { bubbles: true, detail: component }));
  };
  surface.addEventListener("pointermove", (event) => {
    if (event.pointerType === "touch") return;
    const cell = under(event);
    if (cell) show(cell);
    else hideTip();
  });
  surface.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "touch") return;
    hideTip();
    if (held && document.activeElement === surface) place(held);
    else cursor.hidden = true;
  });
  surface.addEventListener("click", (event) => {
    const cell = under(event);
    if (!cell) return;
    settle(cell);
    activate(cell);
  });
  surface.addEventListener("focus", () => {
    if (view() && surface.matches(":focus-visible")) settle(held ?? view().start);
  });
  surface.addEventListener("blur", () => {
    hideTip();
    cursor.hidden = true;
  });
  surface.addEventListener("keydown", (event) => {
    if (!view()) return;
    const { rows, columns } = view();
    const [row, column] = held ?? view().start;
    const to = {
      ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1],
      ArrowUp: [row - 1, column],
      ArrowDown: [row + 1, column],
      Home: [row, 0],
      End: [row, columns - 1],
    }[event.key];
    if (to) {
      event.preventDefault();
      settle([Math.min(Math.max(to[0], 0), rows - 1), Math.min(Math.max(to[1], 0), columns - 1)]);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      activate([row, column]);
    }
  });
  return {
    readout,
    /** To be called after every drawing: the cursor and what it stood on may be gone. */
    refresh() {
      surface.append(cursor);
      const { rows, columns } = view();
      if (held && (held[0] >= rows || held[1] >= columns)) held = null;
      cursor.hidden = true;
      if (surface.matches(":focus-visible")) settle(held ?? view().start);
    },
  };
}

const pen = document.createElement("canvas").getContext("2d");

/** Width of a text in the charts' font, in pixels. */
function textWidth(text) {
  pen.font = "12px system-ui, sans-serif";
  return pen.measureText(text).width;
}

/** A text cut so that it fits into a width. */
function fitted(text, width) {
  if (textWidth(text) <= width) return text;
  let length = text.length;
  while (length > 1 && textWidth(`${text.slice(0, length)}…`) > width) length--;
  return `${text.slice(0, length)}…`;
}
