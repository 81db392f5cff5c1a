// The table of experiments: what the selection shows, sorted by a heading, each with its box to tick.

import { all, byId, make, valueText, whole } from "./dom.js";
import { literal } from "./expression.js";

const CHUNK = 100; // rows that are written at once

export const makeTable = (data, selection) => {
  const table = byId("experiments-table");
  if (!table) return;
  const body = table.tBodies[0];
  const scroll = table.closest(".scroll");
  const headings = all("thead th[data-column]", table);
  const keys = headings.map((th) => th.dataset.column);
  const numeric = (key) => selection.rows.some((row) => typeof row[key] === "number");
  let lines = [];
  let written = 0;

  const line = (row) => {
    const box = make("input", { type: "checkbox", checked: selection.state.ticked.has(row.i) });
    box.setAttribute("aria-label", `tick ${row.name}`);
    box.addEventListener("change", () => selection.tick([row.i], box.checked));
    const tr = make("tr", {}, make("td", {}, box));
    tr.dataset.i = row.i;
    for (const key of keys) {
      const cell = make(key === "name" ? "th" : "td", { textContent: valueText(key, row[key], data.decimals) });
      if (key === "name") Object.assign(cell, { scope: "row", title: row.name, textContent: row.short ?? row.name });
      if (key === "star") cell.textContent = row.star ? "★" : "";
      if (key === "status" && row.reason) cell.textContent += `: ${row.reason}`;
      if (numbers.has(key)) cell.className = "n";
      if (row.status === "finished" && row[key] !== null && row[key] === lowest.get(key)) cell.classList.add("best");
      tr.append(cell);
    }
    return tr;
  };
  const tick = (tr) => {
    const ticked = selection.state.ticked.has(Number(tr.dataset.i));
    tr.classList.toggle("chosen", ticked);
    tr.querySelector("input").checked = ticked;
  };
  const more = (count = CHUNK) => {
    const added = lines.slice(written, written + count).map(line);
    added.forEach(tick);
    body.append(...added);
    written = Math.min(lines.length, written + count);
  };
  const order = () => ({ key: selection.state.sort.replace(/^-/, ""), down: selection.state.sort.startsWith("-") });
  const compare = ({ key, down }) => (a, b) => {
    const [x, y] = [a[key] ?? null, b[key] ?? null];
    if (x === null || y === null) return (x === null) - (y === null) || a.i - b.i;
    const apart = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return (down ? -apart : apart) || a.i - b.i;
  };
  let numbers, lowest;
  const refresh = (stay) => { // where a reader has scrolled to
    numbers = new Set(keys.filter(numeric));
    lowest = new Map(data.lowest.map((key) => [
      key, Math.min(...selection.rows.filter((row) => row.status === "finished" && row[key] !== null).map((row) => row[key])),
    ]));
    lines = selection.shownRows.sort(compare(order()));
    const before = stay ? { rows: written, top: scroll.scrollTop } : { rows: CHUNK, top: 0 };
    body.replaceChildren();
    written = 0;
    more(before.rows);
    scroll.scrollTop = before.top;
    for (const th of headings) {
      th.classList.toggle("n", numbers.has(th.dataset.column));
      const mine = th.dataset.column === (order().key === "place" ? "val_loss" : order().key);
      th.setAttribute("aria-sort", !mine ? "none" : order().down ? "descending" : "ascending");
    }
  };
  headings.forEach((th) => th.querySelector("button").addEventListener("click", () => {
    const key = th.dataset.column;
    selection.set({ sort: selection.state.sort === key ? `-${key}` : key });
  }));
  scroll.addEventListener("scroll", () => {
    if (scroll.scrollTop + scroll.clientHeight > scroll.scrollHeight - 600) more();
  }, { passive: true });
  addEventListener("beforeprint", () => more(300));
  selection.listen((changed) => {
    if (changed.includes("where") || changed.includes("sort")) refresh(changed.includes("rows"));
    else if (changed.includes("ticked")) all("tr", body).forEach(tick);
  });
  refresh();
};

// Where a reader writes the expression, adds a value from a list, and sees how many are left.
export const makeFilter = (selection, filters) => {
  const field = byId("where");
  const add = byId("filter-add");
  const said = [...all(".count"), ...all("#selected .said")];
  const state = () => {
    const [total, shown, ticked] = [selection.rows.length, selection.shown.size, selection.state.ticked.size];
    const parts = [shown === total ? `${whole.format(total)} experiments` : `${whole.format(shown)} of ${whole.format(total)} experiments`];
    if (ticked) parts.push(`${whole.format(ticked)} ticked`);
    said.forEach((element) => { element.textContent = parts.join(", "); });
    byId("selected").hidden = !selection.narrowed && !ticked;
    if (!field) return;
    if (field.value !== selection.state.where) field.value = selection.state.where;
    field.setAttribute("aria-invalid", String(Boolean(selection.problem)));
    byId("problem").textContent = selection.problem;
  };
  field?.addEventListener("input", () => selection.set({ where: field.value }));
  field?.form.addEventListener("submit", (event) => event.preventDefault());
  if (add) {
    for (const column of filters) {
      const values = [...new Set(selection.rows.map((row) => row[column]))].filter((value) => value !== null && value !== undefined);
      if (values.length < 2) continue;
      values.sort((a, b) => (typeof a === "string") - (typeof b === "string") || (a < b ? -1 : 1));
      add.append(make("optgroup", { label: column }, ...values.map((value) => make("option", { value: JSON.stringify([column, value]), textContent: `${column} ${value}` }))));
    }
    add.addEventListener("change", () => {
      if (add.value) selection.narrow(...(([column, value]) => [column, `${column} == ${literal(value)}`])(JSON.parse(add.value)));
      add.value = "";
    });
  }
  all(".untick").forEach((button) => button.addEventListener("click", () => selection.set({ ticked: new Set() })));
  all(".show-all").forEach((button) => button.addEventListener("click", () => selection.set({ where: "", zooms: {} })));
  selection.listen(state);
  state();
};
