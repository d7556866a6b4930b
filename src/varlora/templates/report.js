"use strict";
// A header with data-sort ("number" or "text") becomes a button that sorts its table by the cells' data-v, or text.
function key(row, column, kind) {
  const cell = row.cells[column];
  const text = cell.dataset.v ?? cell.textContent.trim();
  return kind === "number" ? parseFloat(text) : text;
}

function compare(a, b) {
  return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
}

function sort(header) {
  const table = header.closest("table"), kind = header.dataset.sort;
  const first = kind === "number" ? "descending" : "ascending";
  const other = { ascending: "descending", descending: "ascending" };
  const order = header.ariaSort in other ? other[header.ariaSort] : first;
  for (const each of header.parentNode.cells) if (each.dataset.sort) each.ariaSort = "none";
  header.ariaSort = order;
  const sign = order === "ascending" ? 1 : -1;
  const rows = [...table.tBodies[0].rows].map((row) => [key(row, header.cellIndex, kind), row]);
  const known = rows.filter(([value]) => value === value), unknown = rows.filter(([value]) => value !== value);
  known.sort(([a], [b]) => sign * compare(a, b)); // what has no value stays last
  for (const [, row] of [...known, ...unknown]) row.classList.remove("turn");
  table.tBodies[0].append(...[...known, ...unknown].map(([, row]) => row));
}

for (const header of document.querySelectorAll("th[data-sort]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...header.childNodes);
  button.addEventListener("click", () => sort(header));
  header.append(button);
  header.ariaSort ??= "none";
}

// The rows that one method gets right and another wrong: cells have the class r or w.
for (const form of document.querySelectorAll(".filter")) {
  const rows = [...document.getElementById(form.dataset.table).tBodies[0].rows];
  const [right, wrong] = form.querySelectorAll("select"), count = form.querySelector("output");
  const show = () => {
    const wanted = (row, select, kind) => !select.value || row.cells[select.value].classList.contains(kind);
    for (const row of rows) row.hidden = !(wanted(row, right, "r") && wanted(row, wrong, "w"));
    count.value = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };
  form.addEventListener("change", show);
  show();
  form.hidden = false;
}

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
