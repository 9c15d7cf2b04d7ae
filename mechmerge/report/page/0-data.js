// What the page shows: it stands in the page itself (mechmerge/report/page_data.py says what it holds).
const DATA = JSON.parse(document.getElementById("data").textContent);
