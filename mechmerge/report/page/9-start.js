document.documentElement.classList.add("scripted");
setUpTheme();
setUpCharts();
setUpScrolling();
setUpLinks();
