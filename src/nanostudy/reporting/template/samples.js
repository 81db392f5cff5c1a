// Samples side by side: of the ticked experiments, else of those that the page begins with, as far as they are shown.
// A text is put in place as text.

import { byId, make, valueText } from "./dom.js";

export const makeSamples = (data, samples, selection) => {
  const place = byId("sample-cards");
  if (!place) return;
  const sampled = [...new Set(samples.map((sample) => sample.i))]; // the best first
  const prompts = [...new Set(samples.map((sample) => sample.prompt))];
  const promptChoice = byId("sample-prompt");
  const add = byId("sample-add");

  const list = () => {
    if (selection.state.ticked.size) return [...selection.state.ticked];
    const left = sampled.filter((i) => selection.shown.has(i));
    if (left.length === sampled.length) return data.first;
    return left.length > 3 ? [left[0], left[Math.floor(left.length / 2)], left.at(-1)] : left;
  };
  const card = (i) => {
    const row = selection.rows[i];
    const close = make("button", { type: "button", textContent: "×" });
    close.setAttribute("aria-label", `put away ${row.name}`);
    close.addEventListener("click", () => selection.set({ ticked: new Set(list().filter((other) => other !== i)) }));
    const loss = row.val_loss === null ? row.status : `validation loss ${valueText("val_loss", row.val_loss, data.decimals)}`;
    const article = make("article", { className: "sample" },
      make("h3", {}, make("span", { textContent: row.short ?? row.name, title: row.name }), close),
      make("p", { textContent: row.place === null ? loss : `place ${row.place}, ${loss} nats per token` }));
    article.dataset.i = i;
    const texts = samples.filter((s) => s.i === i && (promptChoice.value === "all" || s.prompt === prompts[Number(promptChoice.value)]));
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
  const show = () => place.replaceChildren(...list().map(card));

  promptChoice.append(make("option", { value: "all", textContent: prompts.length > 1 ? "any prompt" : "its prompt" }));
  if (prompts.length > 1) {
    prompts.forEach((prompt, k) => promptChoice.append(make("option", { value: String(k), textContent: prompt || "a new line" })));
  }
  promptChoice.addEventListener("change", show);
  add.append(make("option", { value: "", textContent: "choose an experiment" }));
  for (const i of sampled) {
    const row = selection.rows[i];
    const loss = row.val_loss === null ? row.status : valueText("val_loss", row.val_loss, data.decimals);
    add.append(make("option", { value: String(i), textContent: `${row.short ?? row.name} (${loss})` }));
  }
  add.addEventListener("change", () => {
    if (add.value !== "") selection.tick([...list(), Number(add.value)], true);
    add.value = "";
  });
  selection.listen((changed) => { if (changed.includes("ticked") || changed.includes("where")) show(); });
  show();
};
