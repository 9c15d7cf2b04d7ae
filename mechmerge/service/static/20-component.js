// Tables as the server names them: {caption, header, rows}.

function tableOf({ caption, header, rows }) {
  const head = header.map((name) => node("th", { scope: "col" }, name));
  const cells = (row) => row.map((value, at) => (at ? node("td", { class: "number" }, value) : node("th", { scope: "row" }, value)));
  const body = rows.map((row) => node("tr", {}, ...cells(row)));
  const made = node("table", {}, node("caption", {}, node("span", {}, caption)), node("thead", {}, node("tr", {}, ...head)), node("tbody", {}, ...body));
  return scrolling(made, caption);
}

/** What the server answers, as JSON; null where it answers nothing of use, which is said. */
async function asked(address, signal) {
  try {
    const answer = await fetch(address, { signal, headers: { Accept: "application/json" } });
    const found = answer.headers.get("Content-Type")?.includes("json") ? await answer.json() : null;
    if (answer.ok && found) return found;
    if (answer.redirected) location.reload();
    say("The server refused that.");
  } catch (error) {
    if (error.name !== "AbortError") say("The server cannot be reached.");
  }
  return null;
}

/** The component that is chosen in a map, or named in the form. */
function setUpComponent() {
  const form = document.getElementById("component");
  if (!form) return;
  const place = document.getElementById("facts");
  const show = async (name) => {
    form.elements.component.value = name;
    const found = await asked(`${form.dataset.json}?name=${encodeURIComponent(name)}`);
    if (!found) {
      place.replaceChildren(node("p", { class: "note" }, `Nothing is known of ${name}.`));
      return;
    }
    place.replaceChildren(node("h3", {}, found.name), ...found.tables.map(tableOf));
    say(found.said);
    history.replaceState(null, "", `?component=${encodeURIComponent(name)}`);
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    show(form.elements.component.value);
  });
  document.addEventListener("choose", (event) => show(event.detail));
}
