"use strict";
const order = new Intl.Collator("en", { numeric: true });
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
      const rows = [...table.tBodies[0].rows].sort((a, b) => order.compare(value(a), value(b)));
      table.tBodies[0].append(...(up ? rows : rows.reverse()));
    };
  });
}
for (const facet of document.querySelectorAll(".facet")) {
  const budget = facet.querySelector(".budget");
  const slider = budget.querySelector("input");
  const rows = [...facet.querySelectorAll("tbody tr")];
  const points = [...facet.querySelectorAll(".front")].reverse(); // the fastest is drawn first
  const show = () => {
    const at = rows.findIndex((row) => Number(row.dataset.speed) >= Number(slider.value));
    rows.forEach((row, i) => row.classList.toggle("chosen", i === at));
    points.forEach((point, i) => point.classList.toggle("chosen", i === at));
    budget.querySelector("output").textContent =
      `At least ${Number(slider.value).toFixed(2)} times as fast: ${at < 0 ? "none" : rows[at].dataset.says}`;
  };
  budget.hidden = false;
  slider.oninput = show;
  show();
}
