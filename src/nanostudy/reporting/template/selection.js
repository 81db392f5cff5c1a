// The one selection of a page: which experiments are shown, which are ticked, how they are coloured, where figures are zoomed.
// The table, the figures and the samples follow it, and the address has it.

import { narrowed, parse } from "./expression.js";

// `rows`: the experiments, each with its place `i`. Listeners get the names of what changed.
export const makeSelection = (rows, colour) => {
  const listeners = [];
  const state = { where: "", ticked: new Set(), colour, floor: false, zooms: {}, sort: "place" };
  const first = { ...state, ticked: [] };
  let columns, shown, problem;

  const apply = () => {
    try {
      const { test } = parse(state.where, columns);
      shown = new Set(rows.filter(test).map((row) => row.i));
      problem = "";
    } catch (wrong) { problem = wrong.message; } // what was shown stays
  };
  const take = (all) => { rows = all; columns = Object.keys(rows[0] ?? {}); apply(); };
  take(rows);

  const set = (changes) => {
    const changed = Object.keys(changes).filter((key) => changes[key] !== state[key]);
    Object.assign(state, changes);
    if ("where" in changes) apply();
    if (changed.length) listeners.forEach((listener) => listener(changed));
  };

  return {
    state,
    set,
    get rows() { return rows; },
    get shown() { return shown; },
    get problem() { return problem; },
    get shownRows() { return rows.filter((row) => shown.has(row.i)); },
    get narrowed() { return shown.size < rows.length; },
    listen: (listener) => { listeners.push(listener); },
    replaceRows: (all) => { take(all); listeners.forEach((listener) => listener(["rows", "where"])); }, // of a study that runs
    tick: (places, yes) => {
      const ticked = new Set(state.ticked);
      for (const i of places) if (yes ?? !ticked.has(i)) ticked.add(i); else ticked.delete(i);
      set({ ticked });
    },
    narrow: (column, clause) => set({ where: narrowed(state.where, column, clause, columns) }),
    zoom: (panel, ends) => {
      const { [panel]: _, ...others } = state.zooms;
      set({ zooms: ends ? { ...others, [panel]: ends } : others });
    },
    // What differs from the beginning, for the address.
    get query() {
      const values = new URLSearchParams();
      const put = (key, value, usual) => { if (String(value) !== String(usual)) values.set(key, value); };
      put("where", state.where, "");
      put("ticked", [...state.ticked].join(), "");
      put("colour", state.colour, first.colour);
      put("floor", Number(state.floor), 0);
      put("sort", state.sort, first.sort);
      put("zoom", Object.keys(state.zooms).length ? JSON.stringify(state.zooms) : "", "");
      return values.toString();
    },
    readQuery: (query) => {
      const values = new URLSearchParams(query);
      let zooms = {};
      try { zooms = JSON.parse(values.get("zoom") ?? "{}"); } catch { /* an address that was cut off */ }
      const places = (values.get("ticked") ?? "").split(",").filter(Boolean).map(Number);
      set({
        where: values.get("where") ?? "", ticked: new Set(places.filter((i) => rows[i])), colour: values.get("colour") ?? first.colour,
        floor: values.get("floor") === "1", sort: values.get("sort") ?? first.sort, zooms,
      });
    },
  };
};
