async function start() {
  document.documentElement.classList.add("scripted");
  darkSystem.addEventListener("change", () => themed.forEach((draw) => draw()));
  // Where tabs do not fit, that of this page is in sight.
  const tab = document.querySelector("nav.tabs [aria-current]");
  if (tab) tab.closest("nav").scrollLeft = tab.offsetLeft - 16;
  setUpList();
  setUpJob();
  setUpComponent();
  setUpBuilder();
  setUpScrolling();
  setUpLinks();
  const address = document.body.dataset.charts;
  if (!address) return;
  DATA = await asked(address);
  if (DATA) setUpCharts();
}

start();
