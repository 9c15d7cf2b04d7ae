// What is live: the list of jobs, and the page of one that runs. Both are as new as their last reload without this.

/** Writes a text into each field of a name. */
function write(row, name, text) {
  for (const place of row.querySelectorAll(`[data-field="${name}"]`)) {
    if (place.textContent !== String(text)) place.textContent = text;
  }
}

const say = (text) => {
  document.getElementById("said").textContent = text;
};

/** Shows where a job's step is. */
function progress(place, { state, step, units, done, total }) {
  place.hidden = state !== "running";
  write(place, "step", step);
  write(place, "units", units);
  const bar = place.querySelector("progress");
  bar.max = total || 1;
  if (total) bar.value = done;
  else bar.removeAttribute("value");
}

function fillRow(made, row) {
  made.dataset.job = row.id;
  const link = made.querySelector("a");
  link.href = `/runs/${row.id}`;
  for (const name of ["title", "said", "id", "user", "priority", "added", "took"]) write(made, name, row[name]);
  made.querySelector(".state").className = `state ${row.tone}`;
  progress(made.querySelector(".work"), row);
}

/** The list of jobs: rows stay the elements that they are, so that the focus stays where it is. */
function setUpList() {
  const address = document.body.dataset.live;
  if (!address) return;
  const body = document.getElementById("rows");
  const known = new Map();
  for (const row of body.rows) known.set(row.dataset.job, row.querySelector('[data-field="said"]').textContent);
  new EventSource(address).addEventListener("list", (event) => {
    const { rows, counts } = JSON.parse(event.data);
    const held = new Map([...body.rows].map((row) => [row.dataset.job, row]));
    rows.forEach((row, at) => {
      const made = held.get(row.id) ?? document.getElementById("row").content.firstElementChild.cloneNode(true);
      held.delete(row.id);
      fillRow(made, row);
      if (body.rows[at] !== made) body.insertBefore(made, body.rows[at] ?? null);
      if (known.get(row.id) !== row.said) say(`${row.title}: ${row.said}`);
      known.set(row.id, row.said);
    });
    held.forEach((row) => row.remove());
    document.getElementById("none").hidden = rows.length > 0;
    for (const place of document.querySelectorAll("[data-count]")) place.textContent = counts[place.dataset.count];
  });
}

/** The page of a job that has not ended: its stages, steps and notes as they come. */
function setUpJob() {
  const address = document.body.dataset.follow;
  if (!address) return;
  const source = new EventSource(address);
  const list = document.getElementById("stage-list");
  const log = document.getElementById("log");
  const place = document.querySelector(".live .work");
  const heard = (type, act) => source.addEventListener(type, (event) => act(JSON.parse(event.data)));
  const mark = (item, said) => {
    item.className = said.replace(" ", "-");
    item.querySelector(".quiet").textContent = said;
  };
  const leave = (said) => list.querySelectorAll(".at-work").forEach((item) => mark(item, said));
  heard("stage", ({ stage, text }) => {
    leave("done");
    document.getElementById("no-stages").hidden = true;
    list.querySelector(`[data-stage="${CSS.escape(stage)}"]`)?.remove();
    const item = node("li", { "data-stage": stage }, node("span", {}, stage), " ", node("span", { class: "quiet" }, ""));
    mark(item, text === "unchanged" ? "unchanged" : "at work");
    list.append(item);
    progress(place, { state: "running", step: stage, units: "", done: 0, total: 0 });
  });
  const units = ({ stage, text, done, total }) =>
    progress(place, { state: "running", step: [stage, text].filter(Boolean).join(" · "), units: total ? `${done} of ${total}` : "", done, total });
  heard("step", units);
  heard("progress", units);
  const line = (type, time, text) => {
    const at = new Date(1000 * time);
    const said = node("time", { datetime: at.toISOString() }, at.toISOString().slice(11, 19));
    log.append(node("li", { class: `is-${type}` }, node("span", { class: "quiet" }, said), " ", text));
    log.parentElement.scrollTop = log.parentElement.scrollHeight;
  };
  heard("note", ({ time, text }) => line("note", time, text));
  heard("state", ({ time, text }) => {
    line("state", time, text);
    document.querySelector('.meta [data-field="said"]').textContent = text;
    document.querySelector(".meta .state").className = `state ${text === "running" ? "live" : "quiet"}`;
  });
  // `error` is also what the browser itself calls a lost connection; ours hold data.
  source.addEventListener("error", (event) => {
    if (!event.data) return;
    const { time, text } = JSON.parse(event.data);
    line("error", time, text);
  });
  heard("end", () => {
    source.close();
    leave("done");
    place.hidden = true;
    document.getElementById("finished").hidden = false;
    say("It has ended.");
    // Whoever is at work on the page is left there, with a link.
    if (document.activeElement === document.body) location.reload();
  });
}
