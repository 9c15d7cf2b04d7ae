// The recipe builder: the server says what the settings come to, whenever one changes.
const PAUSE = 120;

function setUpBuilder() {
  const form = document.getElementById("builder");
  if (!form) return;
  const get = (id) => document.getElementById(id);
  const only = () => {
    for (const part of form.querySelectorAll("[data-for]")) {
      part.hidden = !part.dataset.for.split(" ").includes(form.elements.policy.value);
      // What is hidden belongs to another policy, and is not sent.
      for (const field of part.querySelectorAll("input, select")) field.disabled = part.hidden;
    }
  };
  const query = () => new URLSearchParams(new FormData(form)).toString();
  let asking = null;
  const show = async () => {
    asking?.abort();
    asking = new AbortController();
    const found = await asked(`${form.dataset.json}?${query()}`, asking.signal);
    if (!found) return;
    const problem = get("problem");
    problem.replaceChildren();
    if (found.problem) {
      problem.append(node("p", { class: "problem" }, found.problem));
      get("summary").textContent = "";
      for (const id of ["notes", "tables", "shares"]) get(id).replaceChildren();
      return;
    }
    get("summary").textContent = found.said;
    get("notes").replaceChildren(...found.notes.map((note) => node("li", {}, note)));
    get("tables").replaceChildren(...found.tables.map(tableOf));
    get("snippet").textContent = found.snippet;
    if (get("use")) get("use").href = `/new?from=${form.dataset.run}&${found.query}`;
    get("download").href = `/runs/${form.dataset.run}/builder/recipe.zip?${found.query}`;
    const panels = node("div", { class: "panels wide" });
    get("shares").replaceChildren(panels);
    for (const expert of found.recipe.experts) {
      if (!Object.keys(expert.kinds).length) continue;
      const panel = node("div", { class: "panel" }, node("h3", {}, `Of ${expert.name}, by layer`));
      panels.append(panel);
      shares(panel, found.recipe, expert);
    }
    history.replaceState(null, "", `?${found.query}`);
  };
  let waiting = 0;
  form.addEventListener("input", (event) => {
    only();
    const out = event.target.labels?.length && form.querySelector(`output[for="${CSS.escape(event.target.id)}"]`);
    if (out) out.textContent = out.dataset.percent === "yes" ? `${Math.round(100 * event.target.value)} %` : String(Number(event.target.value));
    clearTimeout(waiting);
    waiting = setTimeout(show, PAUSE);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    show();
  });
  only();
  show();
}
