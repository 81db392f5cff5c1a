// Figures: drawn when they come near, with what the selection shows. A click ticks, a drag zooms, and on parallel
// coordinates a drag narrows the selection; the line nearest to the pointer says what it is.

import { all, byId, make, scheme, valueText } from "./dom.js";
import { literal } from "./expression.js";
import { changes, means } from "./means.js";

const NEAR = 24; // pixels from a line that still mean it
const DRAG = 6; // pixels that make a click a drag
const MOST_LISTED = 6; // values of a setting; more become a range

const tip = () => byId("tip") ?? document.body.appendChild(make("div", { id: "tip", hidden: true }));

const showTip = (event, lines) => {
  const box = tip();
  box.hidden = !lines;
  if (!lines) return;
  box.replaceChildren(...lines.map(([name, value]) => make("p", {}, name ? make("span", { textContent: name }) : "", String(value))));
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  box.style.top = `${event.clientY + 18 + height > innerHeight ? Math.max(4, event.clientY - height - 12) : event.clientY + 18}px`;
};

// Panels can be zoomed: each scale of numbers gets an end of its own, as a domain that wins over the data's.
const zoomable = (spec) => {
  for (const axis of ["x", "y"]) {
    spec.signals.push({ name: `zoom_${axis}`, value: null });
    const scale = spec.scales.find((one) => one.name === axis);
    if (scale && !["band", "point", "ordinal"].includes(scale.type)) scale.domainRaw = { signal: `zoom_${axis}` };
  }
  const clip = (marks) => marks.forEach((mark) => {
    if (mark.marks) clip(mark.marks);
    else if (mark.type !== "text") mark.clip = { signal: "zoom_x || zoom_y ? true : false" };
  });
  clip(spec.marks);
  return spec;
};

const distance = (x, y, [ax, ay], [bx, by]) => {
  const [dx, dy] = [bx - ax, by - ay];
  const share = dx || dy ? Math.max(0, Math.min(1, ((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy))) : 0;
  return Math.hypot(x - ax - share * dx, y - ay - share * dy);
};

// `data`: the page's data; `tables`: its tables by name.
export const makeFigures = (data, tables, selection) => {
  const views = new Map(); // a panel's element, and what is drawn there
  const drawing = new Map();

  const kept = (rows) => {
    if (!rows.length || (rows[0].i === undefined && rows[0].cell === undefined)) return rows;
    if (rows[0].i !== undefined) return rows.filter((row) => selection.shown.has(row.i));
    const cells = new Set(selection.shownRows.map((row) => row.cell));
    return rows.filter((row) => cells.has(row.cell));
  };
  // A figure's rows as the selection has them.
  const current = (rows, meta) => {
    if (!selection.narrowed || !rows.length) return rows;
    if (meta.changes && "effect" in rows[0]) return changes(rows, selection.shownRows, meta.changes, data.settings);
    if (meta.means && "mean" in rows[0]) return means(rows, selection.shownRows, "val_loss", meta.means);
    return kept(rows);
  };
  // Of a panel's axes: a reader's zoom, or what means of a part need.
  const ends = (element, meta) => {
    const zoom = selection.state.zooms[element.dataset.key];
    if (zoom || !meta.means || !selection.narrowed) return zoom ?? [null, null];
    const values = data.figures[element.closest(".figure").dataset.figure].panels
      .flatMap((panel) => Object.values(panel.datasets).flatMap((rows) => current(rows, panel.usermeta))).map((row) => row.mean);
    const room = 0.08 * (Math.max(...values) - Math.min(...values)) || 0.01;
    return [null, values.length ? [Math.min(...values) - room, Math.max(...values) + room] : null];
  };
  const note = (figure) => {
    const place = figure.querySelector(".of-shown");
    const mine = [...views.entries()].filter(([element]) => figure.contains(element)).map(([, view]) => view);
    place.textContent = !selection.narrowed ? "" : mine.some(({ meta }) => meta.changes || meta.means)
      ? "Of the experiments that are shown: plain differences and means, without intervals."
      : mine.some(({ named }) => Object.values(named).some((rows) => rows[0]?.i !== undefined)) ? "" : "Of all experiments, whatever is shown.";
  };
  const groups = () => {
    const values = [...new Set(selection.rows.map((row) => row[selection.state.colour] ?? "not known"))];
    return values.sort((a, b) => (typeof a === "string") - (typeof b === "string") || (a < b ? -1 : 1));
  };
  const signals = () => ({ colour: selection.state.colour, groups: groups(), chosen: [...selection.state.ticked], floor: selection.state.floor, ink: data.looks[scheme()].text.color });

  const update = async (changed) => {
    await Promise.all(drawing.values());
    const values = signals();
    await Promise.all([...views.entries()].map(([element, { view, named, meta, parameters }]) => {
      for (const [name, value] of Object.entries(values)) if (parameters.includes(name)) view.signal(name, value);
      const [x, y] = ends(element, meta);
      view.signal("zoom_x", x).signal("zoom_y", y);
      if (changed.includes("where")) for (const [name, rows] of Object.entries(named)) view.data(name, current(rows, meta));
      return view.resize().runAsync();
    }));
    drawing.forEach((_, figure) => note(figure));
  };

  const draw = async (figure) => {
    const { panels, tables: names } = data.figures[figure.dataset.figure];
    const narrow = innerWidth < 740;
    const config = structuredClone(data.looks[scheme()]);
    if (narrow) {
      config.axisY = { ...config.axisY, labelLimit: 150, labelFontSize: 10 };
      config.axisX = { ...config.axisX, tickCount: 4, titleAnchor: "end", titleAlign: "right" };
      config.legend = { ...config.legend, titleOrient: "top", columns: 3, columnPadding: 10, gradientLength: 120 };
    }
    const values = signals();
    for (const element of all(".panel", figure)) {
      const { brief, ...rest } = panels[Number(element.dataset.panel)];
      const spec = JSON.parse(JSON.stringify(rest), (key, value) => (narrow && typeof value === "string" ? brief?.[value] ?? value : value));
      const named = { ...spec.datasets, ...Object.fromEntries(names.map((name) => [name, tables[name]])) };
      spec.datasets = Object.fromEntries(Object.entries(named).map(([name, rows]) => [name, current(rows, spec.usermeta).map((row) => ({ ...row }))]));
      for (const parameter of spec.params) if (parameter.name in values) parameter.value = values[parameter.name];
      views.get(element)?.result.finalize();
      const result = await vegaEmbed(element, spec, {
        ast: true, actions: false, renderer: names.includes("curves") ? "canvas" : "svg", config, defaultStyle: false, logLevel: 1, patch: zoomable,
        tooltip: (handler, event, item, value) => { if (value || !spec.usermeta.lines) showTip(event, value ? about(item?.datum, value) : null); },
      });
      const there = new Set(result.vgSpec.data.map((one) => one.name));
      for (const name of Object.keys(named)) if (!there.has(name)) delete named[name];
      const place = { result, view: result.view, named, meta: spec.usermeta, parameters: spec.params.map((one) => one.name) };
      result.view.addEventListener("pointermove", (event, item) => { place.item = item; });
      result.view.addEventListener("pointerdown", (event, item) => { place.item = item; });
      views.set(element, place);
      const [x, y] = ends(element, spec.usermeta);
      result.view.signal("zoom_x", x).signal("zoom_y", y);
      await result.view.runAsync();
      listen(element);
    }
    figure.dataset.drawn = scheme();
    note(figure);
  };

  // --- words at the pointer

  const experiment = (i) => {
    const row = selection.rows[i];
    return [["", row.short ?? row.name], ...data.settings.map((name) => [name, row[name] ?? "not known"])];
  };
  const about = (datum, value) => {
    const lines = typeof value === "object" ? Object.entries(value) : [["", value]];
    if (datum?.i === undefined) return lines;
    return [...experiment(datum.i), ...lines.filter(([name]) => !["experiment", "setting"].includes(name))];
  };

  // --- the pointer on a panel

  const pointer = (element, event) => {
    const { view } = views.get(element);
    const box = element.querySelector("canvas, svg").getBoundingClientRect();
    const [left, top] = [view.padding().left + view.origin()[0], view.padding().top + view.origin()[1]];
    return { x: event.clientX - box.left - left, y: event.clientY - box.top - top, left: box.left + left, top: box.top + top, width: view.width(), height: view.height() };
  };
  const nearest = (element, { x, y, width, height }) => {
    const { view, named, meta } = views.get(element);
    if (!meta.lines || x < -NEAR || y < -NEAR || x > width + NEAR || y > height + NEAR) return null;
    const [sx, sy] = [view.scale("x"), view.scale("y")];
    let best = null;
    let before = null;
    for (const row of kept(named[meta.lines.table] ?? Object.values(named).find((rows) => rows[0]?.[meta.lines.y] !== undefined))) {
      if (row[meta.lines.y] === null) continue;
      const at = [sx(row[meta.lines.x]), sy(row[meta.lines.y])];
      const away = distance(x, y, before?.row.i === row.i ? before.at : at, at);
      const close = Math.hypot(x - at[0], y - at[1]);
      if (away < (best?.away ?? NEAR)) best = { row: before?.row.i === row.i && Math.hypot(x - before.at[0], y - before.at[1]) < close ? before.row : row, away };
      before = { row, at };
    }
    return best?.row ?? null;
  };

  const hover = (i) => views.forEach(({ view, parameters }) => {
    if (parameters.includes("hovered") && view.signal("hovered") !== i) view.signal("hovered", i).runAsync();
  });

  const brush = (meta, x, from, to, view, height) => {
    const [name, axis] = Object.entries(meta.axes).map(([column, axis]) => [column, { ...axis, away: Math.abs(view.scale("x")(axis.title) - x) }])
      .sort((a, b) => a[1].away - b[1].away)[0];
    const [low, high] = [1 - to / height, 1 - from / height].map((share) => share * 1.04 - 0.02); // the scale's ends
    const levels = axis.levels?.filter(([, at]) => at + axis.half >= low && at - axis.half <= high).map(([level]) => literal(level));
    const loss = (at) => axis.ends[0] + Math.max(0, Math.min(1, at)) * (axis.ends[1] - axis.ends[0]);
    const clause = !levels ? `${(Math.floor(loss(low - 0.01) * 1e4) / 1e4).toFixed(4)} <= ${name} <= ${(Math.ceil(loss(high + 0.01) * 1e4) / 1e4).toFixed(4)}`
      : levels.length > MOST_LISTED ? `${levels[0]} <= ${name} <= ${levels.at(-1)}`
        : levels.length > 1 ? `${name} in [${levels.join(", ")}]` : `${name} == ${levels[0]}`;
    if (!levels || levels.length) selection.narrow(name, clause);
  };

  const dragged = (element, start, end) => {
    const { view, meta } = views.get(element);
    const [[x0, x1], [y0, y1]] = [[start.x, end.x], [start.y, end.y]].map((ends) => ends.sort((a, b) => a - b));
    if (meta.axes) { brush(meta, start.x, y0, y1, view, start.height); return; }
    const between = (axis, low, high) => {
      const scale = view.scale(axis);
      return scale?.invert && high - low > DRAG && scale.domain().every(Number.isFinite) ? [scale.invert(low), scale.invert(high)].map((value) => Number(value.toPrecision(5))) : null;
    };
    const size = [[x0, x1, start.width], [y0, y1, start.height]].map(([low, high, most]) => [Math.max(0, low), Math.min(most, high)]);
    selection.zoom(element.dataset.key, [between("x", ...size[0]), between("y", ...size[1])?.reverse() ?? null]);
  };

  const clicked = (element, event) => {
    const { meta, view, item } = views.get(element);
    const at = pointer(element, event);
    if (meta.axes) { // a level's band, else the nearest line
      const axis = Object.values(meta.axes).find((one) => one.levels && Math.abs(view.scale("x")(one.title) - at.x) < 14);
      if (axis) { brush(meta, at.x, at.y, at.y, view, at.height); return; }
    }
    const { i, cell } = nearest(element, at) ?? item?.datum ?? {};
    if (i !== undefined) selection.tick([i]);
    else if (cell !== undefined) selection.tick(selection.rows.filter((row) => row.cell === cell).map((row) => row.i));
  };

  const listen = (element) => {
    if (element.dataset.listens) return;
    element.dataset.listens = "yes";
    let start = null;
    const frame = make("div", { className: "brush", hidden: true });
    document.body.append(frame);
    const over = (event) => {
      const { meta } = views.get(element);
      if (!meta.lines || start) return;
      const line = nearest(element, pointer(element, event));
      hover(line ? line.i : -1);
      const measured = line ? meta.lines.says.map(([column, title]) => [title, valueText(column, line[column], data.decimals)]) : [];
      showTip(event, line ? [...experiment(line.i), ...measured] : null);
    };
    element.addEventListener("pointermove", (event) => {
      over(event);
      if (!start) return;
      const now = pointer(element, event);
      if (Math.hypot(now.x - start.x, now.y - start.y) < DRAG) return;
      const box = (a, b, low, size) => [Math.max(0, Math.min(a, b)) + low, Math.min(size, Math.max(a, b)) - Math.max(0, Math.min(a, b))];
      const [left, width] = views.get(element).meta.axes ? [start.left + start.x - 9, 18] : box(start.x, now.x, start.left, start.width);
      const [top, height] = box(start.y, now.y, start.top, start.height);
      frame.hidden = false;
      Object.assign(frame.style, { left: `${left}px`, top: `${top}px`, width: `${Math.max(0, width)}px`, height: `${Math.max(0, height)}px` });
      showTip(event, null);
    });
    element.addEventListener("pointerdown", (event) => {
      if (event.button || event.pointerType === "touch") return; // a finger scrolls, and a tap is a click
      start = pointer(element, event);
      element.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    element.addEventListener("pointerup", (event) => {
      const [from, end] = [start, start && pointer(element, event)];
      start = null;
      frame.hidden = true;
      if (from && Math.hypot(end.x - from.x, end.y - from.y) >= DRAG) dragged(element, from, end);
      else if (from || event.pointerType === "touch") clicked(element, event);
    });
    element.addEventListener("pointerleave", () => { if (!start) { hover(-1); tip().hidden = true; } });
    element.addEventListener("dblclick", () => selection.zoom(element.dataset.key, null));
  };

  // --- when

  const drawOnce = (figure) => {
    if (!window.vegaEmbed || drawing.has(figure)) return drawing.get(figure);
    const promise = draw(figure).catch((problem) => {
      console.error(problem);
      figure.querySelector(".panels").append(make("p", { className: "note", textContent: "This figure could not be drawn by this browser." }));
    });
    drawing.set(figure, promise);
    return promise;
  };
  const nearing = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting) { nearing.unobserve(target); drawOnce(target); }
  }, { rootMargin: "500px 0px" });
  all(".figure[data-figure]").forEach((figure) => nearing.observe(figure));
  selection.listen(update);

  return {
    views,
    drawAll: () => Promise.all(all(".figure[data-figure]").map(drawOnce)),
    redraw: async () => { for (const figure of [...drawing.keys()]) { await drawing.get(figure); drawing.set(figure, draw(figure)); } },
  };
};
