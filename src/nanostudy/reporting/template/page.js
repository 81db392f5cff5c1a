"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rowsOf = ({ columns, rows }) =>
    rows.map((row) => Object.fromEntries(columns.map((name, k) => [name, row[k]])));
  const tables = { experiments: rowsOf(data.experiments), curves: rowsOf(data.curves) };
  const samples = rowsOf(data.samples);
  const chosen = new Set();
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const make = (tag, settings = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), settings);
    element.append(...children);
    return element;
  };

  // --- light and dark

  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => root.dataset.theme || (prefersDark.matches ? "dark" : "light");
  const remember = (value) => {
    try { localStorage.setItem("nanostudy-theme", value); } catch { /* a browser may keep nothing for files */ }
  };
  try {
    const kept = localStorage.getItem("nanostudy-theme");
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch { /* as above */ }
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    remember(root.dataset.theme);
    redraw();
  });
  prefersDark.addEventListener("change", () => redraw());

  // --- figures: drawn when they come near, and again when the scheme changes

  const views = new Map(); // a panel's element and its view
  const settings = { colour: data.colourings[0], top: null };
  const drawing = new Map();

  const apply = (view) => {
    const signals = view.getState({ signals: (name) => ["colour", "chosen", "top"].includes(name) }).signals;
    if ("colour" in signals) view.signal("colour", settings.colour);
    if ("chosen" in signals) view.signal("chosen", [...chosen]);
    if ("top" in signals && settings.top !== null) view.signal("top", settings.top);
    return view.runAsync();
  };

  const draw = async (figure) => {
    const { panels, tables: named } = data.figures[figure.dataset.figure];
    for (const element of all(".panel", figure)) {
      const spec = structuredClone(panels[Number(element.dataset.panel)]);
      spec.datasets = spec.datasets || {};
      for (const name of named) spec.datasets[name] = tables[name].map((row) => ({ ...row }));
      for (const parameter of spec.params) {
        if (parameter.name === "colour") parameter.value = settings.colour;
        if (parameter.name === "chosen") parameter.value = [...chosen];
        if (parameter.name === "top" && settings.top !== null) parameter.value = settings.top;
      }
      const narrow = innerWidth < 740;
      const config = structuredClone(data.looks[theme()]);
      if (narrow) {
        config.axisY = { ...config.axisY, labelLimit: 212, labelFontSize: 10 };
        config.axisX = { ...config.axisX, tickCount: 4, titleAnchor: "end", titleAlign: "right" };
        config.axisTop = { ...config.axisTop, labelAngle: -32, labelAlign: "left", labelFontSize: 10 };
        config.legend = { ...config.legend, titleOrient: "top", direction: "vertical", columns: 1, gradientLength: 120, layout: { top: { anchor: "end" } } };
      }
      views.get(element)?.finalize();
      const marks = named.includes("curves") ? "canvas" : "svg";
      const result = await vegaEmbed(element, spec, {
        ast: true, actions: false, renderer: marks, config, defaultStyle: false, tooltip: { theme: theme() },
      });
      views.set(element, result);
    }
    figure.dataset.drawn = theme();
  };

  const drawOnce = (figure) => {
    if (!window.vegaEmbed || drawing.has(figure)) return drawing.get(figure);
    const promise = draw(figure).catch((problem) => {
      console.error(problem);
      figure.querySelector(".panels").append(make("p", { className: "note", textContent: "This figure could not be drawn by this browser." }));
    });
    drawing.set(figure, promise);
    return promise;
  };

  const redraw = async () => {
    for (const figure of [...drawing.keys()]) {
      await drawing.get(figure);
      drawing.set(figure, draw(figure));
    }
  };

  const tell = () => Promise.all([...views.values()].map(({ view }) => apply(view)));

  const nearing = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) { nearing.unobserve(target); drawOnce(target); }
    }
  }, { rootMargin: "500px 0px" });
  all(".figure").forEach((figure) => nearing.observe(figure));
  const drawAll = () => Promise.all(all(".figure").map(drawOnce));
  addEventListener("beforeprint", drawAll);

  all("select.colour").forEach((select) => select.addEventListener("change", () => {
    settings.colour = select.value;
    all("select.colour").forEach((other) => { other.value = select.value; });
    tell();
  }));
  all("input.whole").forEach((box) => box.addEventListener("change", () => {
    settings.top = Number(box.checked ? box.dataset.whole : box.dataset.top);
    tell();
  }));

  // --- the table of experiments

  const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const asText = (key, value) => {
    if (value === null || value === undefined) return "";
    if (typeof value !== "number") return String(value);
    const decimals = data.decimals[key];
    if (decimals !== null && decimals !== undefined) return value.toFixed(decimals).replace("-", "−");
    if (decimals === undefined) return String(value); // a setting's value, as it is typed
    return Math.abs(value) >= 1e9 ? value.toExponential(2) : whole.format(value);
  };

  const table = document.getElementById("experiments-table");
  const CHUNK = 100;
  if (table) {
    const body = table.tBodies[0];
    const headings = all("thead th[data-column]", table);
    const keys = headings.map((th) => th.dataset.column);
    const numeric = new Map(keys.map((key) => [key, tables.experiments.some((row) => typeof row[key] === "number")]));
    const lowest = new Map(data.lowest.map((key) => [
      key, Math.min(...tables.experiments.filter((r) => r.status === "finished" && r[key] !== null).map((r) => r[key])),
    ]));
    headings.forEach((th) => th.classList.toggle("n", numeric.get(th.dataset.column)));
    let order = { key: "place", down: false };
    let rows = [];
    let written = 0;

    const line = (row) => {
      const box = make("input", { type: "checkbox", checked: chosen.has(row.i) });
      box.setAttribute("aria-label", `choose ${row.name}`);
      box.addEventListener("change", () => choose(row.i, box.checked));
      const tr = make("tr", { className: chosen.has(row.i) ? "chosen" : "" }, make("td", {}, box));
      tr.dataset.i = row.i;
      for (const key of keys) {
        const cell = make(key === "name" ? "th" : "td", { textContent: asText(key, row[key]) });
        if (key === "name") cell.scope = "row";
        if (key === "status" && row.reason) cell.textContent += `: ${row.reason}`;
        if (numeric.get(key)) cell.className = "n";
        if (lowest.has(key) && row.status === "finished" && row[key] === lowest.get(key)) cell.classList.add("best");
        tr.append(cell);
      }
      return tr;
    };
    const more = (count = CHUNK) => {
      body.append(...rows.slice(written, written + count).map(line));
      written = Math.min(rows.length, written + count);
    };
    const compare = (a, b) => {
      const [x, y] = [a[order.key], b[order.key]];
      if (x === null || y === null) return (x === null) - (y === null) || a.i - b.i;
      const apart = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
      return (order.down ? -apart : apart) || a.i - b.i;
    };
    const filters = all("select[data-filter]");
    const find = document.getElementById("find");
    const refresh = () => {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      const wanted = filters.filter((f) => f.value !== "").map((f) => [f.dataset.filter, JSON.parse(f.value)]);
      rows = tables.experiments.filter((row) => {
        const text = `${row.name} ${row.part} ${row.status} ${row.reason || ""} ${row.cell || ""}`.toLowerCase();
        return words.every((word) => text.includes(word)) && wanted.every(([key, value]) => row[key] === value);
      }).sort(compare);
      body.replaceChildren();
      written = 0;
      more();
      table.closest(".scroll").scrollTop = 0;
      const total = tables.experiments.length;
      document.getElementById("count").textContent =
        rows.length === total ? `${whole.format(total)} experiments` : `${whole.format(rows.length)} of ${whole.format(total)} experiments`;
      for (const th of headings) {
        th.setAttribute("aria-sort", th.dataset.column !== order.key ? "none" : order.down ? "descending" : "ascending");
      }
    };
    headings.forEach((th) => th.querySelector("button").addEventListener("click", () => {
      const key = th.dataset.column;
      order = { key, down: order.key === key && !order.down };
      refresh();
    }));
    find.addEventListener("input", refresh);
    filters.forEach((select) => select.addEventListener("change", refresh));
    const form = find.form;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(refresh));
    const scroll = table.closest(".scroll");
    scroll.addEventListener("scroll", () => {
      if (scroll.scrollTop + scroll.clientHeight > scroll.scrollHeight - 600) more();
    }, { passive: true });
    addEventListener("beforeprint", () => more(300));
    refresh();
  }

  // --- samples side by side; a text is put in place as text

  const place = document.getElementById("sample-cards");
  const sampled = [...new Set(samples.map((sample) => sample.i))];
  let beginning = place ? JSON.parse(place.closest(".sampler").dataset.first) : [];
  const prompts = [...new Set(samples.map((sample) => sample.prompt))];

  const card = (i) => {
    const row = tables.experiments[i];
    const close = make("button", { type: "button", textContent: "×" });
    close.setAttribute("aria-label", `put away ${row.name}`);
    close.addEventListener("click", () => {
      beginning = beginning.filter((other) => other !== i);
      choose(i, false);
    });
    const loss = row.val_loss === null ? row.status : `validation loss ${asText("val_loss", row.val_loss)}`;
    const article = make("article", { className: "sample" },
      make("h3", {}, make("span", { textContent: row.name }), close),
      make("p", { textContent: row.place === null ? loss : `place ${row.place}, ${loss} nats per token` }));
    article.dataset.i = i;
    const prompt = document.getElementById("sample-prompt").value;
    const texts = samples.filter((s) => s.i === i && (prompt === "all" || s.prompt === prompts[Number(prompt)]));
    for (const sample of texts) {
      const text = sample.text.replace(/^\n+/, "");
      const begins = sample.prompt !== "" && text.startsWith(sample.prompt);
      article.append(begins
        ? make("pre", {}, make("b", { textContent: sample.prompt }), text.slice(sample.prompt.length))
        : make("pre", { textContent: text }));
    }
    if (!texts.length) {
      const why = sampled.includes(i) ? "No sample that goes on from this." : "No sample of this experiment is on the page.";
      article.append(make("p", { textContent: why }));
    }
    return article;
  };
  const showSamples = () => {
    if (!place) return;
    const list = chosen.size ? [...chosen] : beginning;
    place.replaceChildren(...list.map(card));
  };
  if (place) {
    const promptChoice = document.getElementById("sample-prompt");
    promptChoice.append(make("option", { value: "all", textContent: prompts.length > 1 ? "any prompt" : "its prompt" }));
    if (prompts.length > 1) {
      prompts.forEach((prompt, k) => promptChoice.append(make("option", { value: String(k), textContent: prompt || "a new line" })));
    }
    promptChoice.addEventListener("change", showSamples);
    const add = document.getElementById("sample-add");
    add.append(make("option", { value: "", textContent: "choose an experiment" }));
    for (const i of sampled) {
      const row = tables.experiments[i];
      const loss = row.val_loss === null ? row.status : asText("val_loss", row.val_loss);
      add.append(make("option", { value: String(i), textContent: `${row.name} (${loss})` }));
    }
    add.addEventListener("change", () => {
      if (add.value !== "") {
        if (!chosen.size) beginning.forEach((i) => chosen.add(i));
        choose(Number(add.value), true);
      }
      add.value = "";
    });
    showSamples();
  }

  const choose = (i, yes) => {
    if (yes) chosen.add(i); else chosen.delete(i);
    if (table) {
      for (const tr of all(`tbody tr[data-i="${i}"]`, table)) {
        tr.classList.toggle("chosen", yes);
        tr.querySelector("input").checked = yes;
      }
      for (const k of chosen) {
        for (const tr of all(`tbody tr[data-i="${k}"]`, table)) {
          tr.classList.add("chosen");
          tr.querySelector("input").checked = true;
        }
      }
    }
    showSamples();
    return tell();
  };

  // --- where a reader is

  const contents = document.getElementById("contents");
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
  all("main section").forEach((section) => reading.observe(section));

  window.nanostudyPage = { drawAll, views, tables, samples };
})();
