// The page: its data, light and dark, where a reader is, and the address that keeps the selection.

import { all, byId, rowsOf, scheme } from "./dom.js";
import { makeFigures } from "./figures.js";
import { makeSamples } from "./samples.js";
import { makeSelection } from "./selection.js";
import { makeFilter, makeTable } from "./table.js";

// Also the ui starts its pages with this, whose data come otherwise.
export const start = (data) => {
  const tables = Object.fromEntries(Object.entries(data.tables).map(([name, table]) => [name, rowsOf(table)]));
  const selection = makeSelection(tables.experiments, data.colourings[0]);

  // --- light and dark

  const root = document.documentElement;
  try {
    const before = localStorage.getItem("nanostudy-theme");
    if (before === "dark" || before === "light") root.dataset.theme = before;
  } catch { /* a browser may keep nothing for files */ }
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = scheme() === "dark" ? "light" : "dark";
    try { localStorage.setItem("nanostudy-theme", root.dataset.theme); } catch { /* as above */ }
    figures.redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => figures.redraw());

  // --- the address: #section?selection

  let section = "";
  const go = () => {
    const [id, query] = location.hash.slice(1).split("?");
    section = id;
    if (query !== undefined) selection.readQuery(query);
    byId(id)?.scrollIntoView();
    keep();
  };
  const keep = () => {
    const query = selection.query;
    const hash = section || query ? `#${section}${query ? `?${query}` : ""}` : "";
    if (hash !== location.hash) history.replaceState(null, "", hash || location.href.split("#")[0]);
  };

  // --- the parts

  const figures = makeFigures(data, tables, selection);
  makeTable(data, selection);
  makeFilter(selection, data.filters);
  makeSamples(data, tables.samples, selection);
  addEventListener("beforeprint", figures.drawAll);

  const colours = all("select.colour");
  const floors = all("input.floor");
  const controls = () => {
    colours.forEach((select) => { select.value = selection.state.colour; });
    floors.forEach((box) => { box.checked = selection.state.floor; });
  };
  colours.forEach((select) => select.addEventListener("change", () => selection.set({ colour: select.value })));
  floors.forEach((box) => box.addEventListener("change", () => selection.set({ floor: box.checked })));
  selection.listen(controls);
  selection.listen(keep);
  addEventListener("hashchange", go);
  go();

  // --- where a reader is

  const contents = byId("contents");
  const wide = matchMedia("(min-width: 86rem)");
  const open = () => { contents.open = wide.matches; };
  wide.addEventListener("change", open);
  open();
  const links = new Map(all("nav a").map((link) => [link.getAttribute("href").slice(1), link]));
  const reading = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      links.forEach((link) => link.removeAttribute("aria-current"));
      links.get(target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -75% 0px" });
  all("main section").forEach((part) => reading.observe(part));

  return { drawAll: figures.drawAll, views: figures.views, tables, selection };
};

const inPage = byId("data");
if (inPage) window.nanostudyPage = start(JSON.parse(inPage.textContent));
