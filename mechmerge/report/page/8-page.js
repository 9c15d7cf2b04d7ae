// What is drawn where: every `data-chart` host of the page gets its chart from DATA.
const CHARTS = { modules, units, neurons, curves: setCurves, effects, recipes, evaluation, differences };

/** Draws a host's chart once its section is open; where on the page it stands does not matter, so that links jump right. */
function setUpCharts() {
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (!isIntersecting) continue;
        watcher.unobserve(target);
        CHARTS[target.dataset.chart](target);
      }
    },
    { rootMargin: "1000000px 0px" },
  );
  for (const host of document.querySelectorAll("[data-chart]")) {
    host.hidden = false;
    watcher.observe(host);
  }
}

/** Only what scrolls needs to be a stop of the Tab key. */
function setUpScrolling() {
  const watcher = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.scrollWidth > target.clientWidth + 1) target.setAttribute("tabindex", "0");
      else target.removeAttribute("tabindex");
    }
  });
  document.querySelectorAll(".scroll").forEach((one) => watcher.observe(one));
}

/** A link to a closed section opens it. */
function setUpLinks() {
  const open = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target instanceof HTMLDetailsElement) target.open = true;
  };
  addEventListener("hashchange", open);
  open();
}
