"use strict";
// Everything is on the page without this: it makes tables sortable, and shows the numbers of a cell at once.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const key = (row, column) => {
    const cell = row.cells[column];
    const data = cell.querySelector("data");
    return data ? Number(data.value) : cell.textContent;
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const numbers = body.rows.length > 0 && typeof key(body.rows[0], column) === "number";
      const now = head.getAttribute("aria-sort");
      const order = now === null ? (numbers ? "descending" : "ascending") : now === "descending" ? "ascending" : "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const compare = (a, b) => (numbers ? a - b : a.localeCompare(b, undefined, { numeric: true }));
      const rows = [...body.rows].sort((a, b) => sign * compare(key(a, column), key(b, column)));
      body.append(...rows);
    });
  });
}
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
document.addEventListener("mouseover", (event) => {
  const cell = event.target.closest(".map td[title], .map td[data-told]");
  tip.hidden = cell === null;
  if (cell === null) return;
  if (cell.title) {
    cell.dataset.told = cell.title;
    cell.setAttribute("aria-label", cell.title);
    cell.removeAttribute("title"); // or the browser shows it a second time
  }
  tip.textContent = cell.dataset.told;
  const box = cell.getBoundingClientRect();
  const left = Math.min(box.left, innerWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above > 0 ? above : box.bottom + 6}px`;
});
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
