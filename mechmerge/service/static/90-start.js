async function start() {
  document.documentElement.classList.add("scripted");
  darkSystem.addEventListener("change", () => themed.forEach((draw) => draw()));
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
