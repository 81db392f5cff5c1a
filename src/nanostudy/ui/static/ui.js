// The ui: the list of studies and runs, and the page of one of them. The report's own modules draw the table and the figures;
// this one gets them their data, and keeps them up to date while a study runs.

import { all, byId, make, whole } from "./dom.js";
import { showEffects, showState } from "./live.js";
import { start } from "./page.js";
import { ask, makePlayground } from "./playground.js";

const number = Number(new URLSearchParams(location.search).get("place"));
const getJson = async (path) => (await ask(path)).json();
const say = (problem) => { byId("trouble").textContent = problem; byId("trouble").hidden = !problem; };

// --- the list

const words = { running: "running", finished: "finished", stopped: "stopped", waiting: "not begun", unfinished: "not finished", diverged: "diverged", unreadable: "cannot be read" };
const line = (place) => {
  const done = place.total > 1 ? `${whole.format(place.done)} of ${whole.format(place.total)} experiments` : place.kind;
  const best = place.best === null || place.best === undefined ? "" : `best ${place.best.toFixed(4)}`;
  const bar = make("i");
  bar.style.width = `${place.total ? (100 * place.done) / place.total : 0}%`;
  return make("li", {}, make("a", { href: `/?place=${place.number}` },
    make("strong", { textContent: place.title }), make("span", { className: `tag ${place.state}`, textContent: words[place.state] ?? place.state }),
    make("span", { className: "about", textContent: place.problem ?? [done, best].filter(Boolean).join(", ") }),
    make("span", { className: "path", textContent: place.path }), make("div", { className: "progress" }, bar)));
};
const showList = (places) => {
  document.querySelector("nav").hidden = true;
  byId("title").textContent = "Studies and runs";
  byId("lede").textContent = places.length ? `${whole.format(places.length)} here. Losses are validation losses in nats per token.` : "None here yet: `nanostudy study run quickstart` begins one. This list finds it.";
  byId("list").replaceChildren(...places.map(line));
  byId("list").hidden = false;
};
const choosing = (places) => {
  const select = byId("places");
  select.replaceChildren(...places.map((place) => make("option", { value: place.number, textContent: place.title, selected: place.number === number })));
  select.addEventListener("change", () => { location.href = `/?place=${select.value}`; });
  select.closest("label").hidden = places.length < 2 || !number;
};

// --- the page of one

const tablesOf = (curves) => ({
  curves: Object.entries(curves).flatMap(([i, curve]) => curve.evaluations.map(([step, train_loss, val_loss]) => ({ i: Number(i), step, train_loss, val_loss, gap: val_loss - train_loss }))),
  batches: Object.entries(curves).flatMap(([i, curve]) => curve.batches.map(([step, loss]) => ({ i: Number(i), step, loss }))),
});
// What runs stands below what has finished, and above what waits.
const ordered = (row) => (row.place === null && row.status === "running" ? { ...row, place: 1e6 + (row.val_loss ?? row.loss ?? 1e6) } : row);
const refill = (table, rows) => table?.splice(0, table.length, ...rows); // figures hold on to the table

const contents = () => {
  byId("contents").querySelector("ol").replaceChildren(...all("main section[id]").filter((section) => !section.hidden)
    .map((section) => make("li", {}, make("a", { href: `#${section.id}`, textContent: section.querySelector("h2").textContent }))));
};

const show = (place) => {
  let state = null;
  let page = null;
  let asked = false;
  const playground = makePlayground(number, () => state, () => page?.selection);

  const open = async () => {
    asked = true;
    try {
      const made = await getJson(`/api/${number}/report`);
      const html = made.sections.replaceAll(/ style="height:(\d+)px"/g, ' data-height="$1"'); // the page's policy takes no styles from HTML
      byId("report").innerHTML = html;
      all("[data-height]").forEach((panel) => { panel.style.height = `${panel.dataset.height}px`; });
      if (made.live) byId("report").after(byId("playground"));
      contents();
      page = start(made.data);
      page.live = made.live;
      window.nanostudyPage = page;
      page.selection.listen(playground.follow);
      showState(state, !made.live);
      if (!made.live && made.lede) byId("lede").textContent = made.lede;
      update();
    } catch (problem) { asked = false; say(problem.message); }
  };
  const update = () => {
    if (!page?.live) return;
    const { curves, batches } = tablesOf(state.curves);
    refill(page.tables.curves, curves);
    refill(page.tables.batches, batches);
    page.selection.replaceRows(state.rows.map(ordered));
  };
  const ready = () => !["running", "waiting"].includes(state.state)
    || Object.values(state.curves).some((curve) => curve.evaluations.length && curve.batches.length);
  const changed = () => {
    say("");
    showState(state, page && !page.live);
    playground.refresh();
    if (!asked && state.rows.length && ready()) open();
    else update();
    const over = page?.live && !["running", "waiting"].includes(state.state);
    if (over && byId("newer").hidden) {
      const button = make("button", { type: "button", textContent: "Show its report" });
      button.addEventListener("click", () => location.reload());
      byId("newer").replaceChildren("The study has ended. ", button);
      byId("newer").hidden = false;
      byId("running").after(byId("newer"));
    }
  };

  const source = new EventSource(`/api/${number}/events`);
  source.addEventListener("state", (event) => { state = JSON.parse(event.data); changed(); });
  source.addEventListener("changes", (event) => {
    const { rows = [], curves = {}, ...rest } = JSON.parse(event.data);
    Object.assign(state, rest);
    state.rows = [...state.rows];
    for (const row of rows) state.rows[row.i] = row;
    state.curves = { ...state.curves, ...curves };
    changed();
  });
  source.addEventListener("effects", (event) => showEffects(JSON.parse(event.data), contents));
  source.addEventListener("problem", (event) => say(JSON.parse(event.data)));
  source.addEventListener("error", () => { if (source.readyState !== EventSource.OPEN) byId("lede").textContent = "The server does not answer: was it ended? It is tried again."; });
};

const begin = async () => {
  const places = await getJson("/api/places");
  choosing(places);
  if (number) return show(places.find((place) => place.number === number));
  if (places.length === 1) return location.replace(`/?place=${places[0].number}`);
  showList(places);
  return setInterval(async () => showList(await getJson("/api/places")), 5000);
};
begin().catch((problem) => say(problem.message));
