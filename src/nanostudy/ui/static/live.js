// What a study is doing: a sentence, a bar, a row a worker, failures with their reasons, effects so far.

import { byId, make, scheme, whole } from "./dom.js";

const duration = (seconds) => {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
};

let ends = null; // when the study will have ended, as far as is known
let sentence = "";
const tick = () => {
  if (!sentence) return;
  const left = ends === null ? "" : `, about ${duration(Math.max(0, (ends - Date.now()) / 1000))} left`;
  byId("lede").textContent = `${sentence}${left}.`;
};
setInterval(tick, 1000);

export const showState = (state, reported) => {
  byId("title").textContent = state.title;
  document.title = `${state.title} · nanostudy`;
  const { counts, rows } = state;
  const best = rows.find((row) => row.place === 1);
  const parts = [`${whole.format(counts.finished ?? 0)} of ${whole.format(rows.length)} finished`];
  for (const status of ["running", "diverged", "failed"]) if (counts[status]) parts.push(`${whole.format(counts[status])} ${status}`);
  const lowest = best ? `; the lowest validation loss is ${best.val_loss.toFixed(4)} (${best.short})` : "";
  const running = state.state === "running";
  ends = running && state.left !== null ? Date.now() + 1000 * state.left : null;
  if (state.kind === "run") sentence = `${running ? "Training" : "One training"}, update ${whole.format(rows[0].step)} of ${whole.format(rows[0].max_iters)}${lowest}`;
  else sentence = rows.length ? `${{ running: "Running", stopped: "Stopped", waiting: "Not begun" }[state.state] ?? "Ended"}: ${parts.join(", ")}${lowest}` : "The study has not begun";
  if (reported) sentence = "";
  tick();

  const share = rows.reduce((sum, row) => sum + (["finished", "diverged", "failed"].includes(row.status) ? 1 : Math.min(1, row.step / Math.max(1, row.max_iters))), 0) / Math.max(1, rows.length);
  const bar = byId("progress");
  bar.hidden = !running;
  bar.setAttribute("aria-valuenow", Math.round(100 * share));
  bar.firstElementChild.style.width = `${100 * share}%`;

  byId("workers").replaceChildren(...state.workers.map((worker) => make("p", {},
    make("span", { className: "worker", textContent: `worker ${worker.worker}` }),
    make("span", { className: `phase ${worker.phase ?? ""}`, textContent: worker.phase || "training" }),
    make("span", { className: "doing", textContent: worker.doing, title: worker.doing }),
    make("span", { className: "rate", textContent: worker.tokens_per_second ? `${whole.format(worker.tokens_per_second)} tokens/s` : "" }))));
  const reasons = rows.filter((row) => row.reason).map((row) => [row.status, `${row.short}: ${row.reason}`]);
  byId("reasons").replaceChildren(...[...reasons, ...state.notes.map((note) => ["note", note])]
    .map(([kind, text]) => make("li", {}, make("span", { className: `tag ${kind}`, textContent: kind }), ` ${text}`)));
  byId("running").hidden = reported || !(state.workers.length || reasons.length);
  byId("so-far").hidden ||= !running;
};

let drawn = null;
export const showEffects = async (effects, changed) => {
  if (!effects || !window.vegaEmbed) return;
  const section = byId("so-far");
  section.hidden = false;
  section.querySelector("figcaption").textContent = `Provisional: from ${whole.format(effects.finished)} of ${whole.format(effects.total)} experiments, and it will change. ${effects.caption}`;
  const place = byId("so-far-panels");
  place.setAttribute("aria-label", effects.alternative);
  const panel = make("div", { className: "panel" });
  panel.style.height = `${effects.panels[0].height}px`;
  place.replaceChildren(panel);
  drawn?.finalize();
  drawn = await window.vegaEmbed(panel, effects.panels[0], { ast: true, actions: false, renderer: "svg", config: effects.looks[scheme()], defaultStyle: false, tooltip: false });
  changed();
};
