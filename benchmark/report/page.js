"use strict";
// A click on a column's heading sorts the table by it, the next click reverses the order. Missing values stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.v ?? "";
    const order = (a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const numbers = !Number.isNaN(Number(x)) && !Number.isNaN(Number(y));
      const sign = numbers ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
      return up ? sign : -sign;
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(order));
  }));
}
