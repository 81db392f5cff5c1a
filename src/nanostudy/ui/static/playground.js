// The playground: one prompt, many models, which write side by side from the same random numbers.

import { byId, make } from "./dom.js";

const BANDS = [0.3, 0.8, 1.5, 2.3, 3.2, 4.5, 6]; // nats: from which surprise on a character is shaded one step darker
const band = (surprise) => (surprise === null ? 0 : BANDS.filter((least) => surprise >= least).length);
const FIRST = 8; // models that are chosen at the beginning, where there are so many

const HTML = `
<h2 id="playground-title">Playground</h2>
<p>All models go on from the same words with the same random numbers: only what they learned tells them apart. The darker a character, the less its model expected it.</p>
<form class="ask">
<label class="prompt">Prompt <textarea name="prompt" rows="2" maxlength="2000" spellcheck="false" autocapitalize="off" placeholder="a new line"></textarea></label>
<div class="knobs">
<label>temperature <input name="temperature" type="number" min="0" max="5" step="0.1" value="0.8"></label>
<label>top-k <input name="top_k" type="number" min="1" step="1" value="200" placeholder="all"></label>
<label>top-p <input name="top_p" type="number" min="0.05" max="1" step="0.05" placeholder="all"></label>
<label>seed <input name="seed" type="number" min="0" step="1" value="1"></label>
<label>length <input name="length" type="number" min="1" max="2000" step="1" value="160"></label>
</div>
<div class="knobs"><label>models <select name="which"></select></label><span class="chosen" role="status"></span></div>
<div class="do"><button type="submit" class="write">Write</button><button type="button" class="stop" hidden>Stop</button>
<button type="button" class="blind">Compare blind</button><button type="button" class="share" disabled>Share</button><span class="scale" aria-hidden="true"></span></div>
<p class="problem" role="status"></p>
</form>
<div class="pens samples" aria-live="off"></div>
<div class="verdict" hidden></div>`;

// The server's answer; throws an Error with what it says is wrong.
export const ask = async (path, how) => {
  const answer = await fetch(path, how);
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).problem ?? `The server answers ${answer.status}.`);
  return answer;
};

export const makePlayground = (number, stateNow, selectionNow) => {
  const section = byId("playground");
  section.innerHTML = HTML;
  const find = (selector) => section.querySelector(selector);
  const form = find("form");
  const [which, cards, verdict] = [form.elements.which, find(".pens"), find(".verdict")];
  find(".scale").append("expected ", ...BANDS.map((_, k) => make("i", { className: `s${k + 1}` })), " a surprise");
  let stopping = null; // of what is being written
  let written = []; // numbers of texts that can be shared
  let pool = "";

  // --- who writes

  const models = () => (stateNow()?.rows ?? []).filter((row) => row.weights).sort((a, b) => (a.best_val_loss ?? Infinity) - (b.best_val_loss ?? Infinity) || a.i - b.i);
  const groups = () => {
    const [rows, { factors }] = [models(), stateNow()];
    const ticked = selectionNow()?.state.ticked ?? new Set();
    const options = [];
    const put = (title, list, group) => { if (list.length) options.push({ title: `${title} (${list.length})`, key: `${group}:${title}`, list, group }); };
    put("ticked in the table", rows.filter((row) => ticked.has(row.i)), "");
    if (rows.length > 2) put("the best, the middle and the worst", [rows[0], rows[Math.floor(rows.length / 2)], rows.at(-1)], "");
    put(rows.length > FIRST ? `the ${FIRST} best` : "all of them", rows.slice(0, FIRST), "");
    if (rows.length > FIRST) put(rows.length > 64 ? "the 64 best" : "all of them", rows.slice(0, 64), "");
    const best = rows[0];
    for (const factor of factors) { // its values, the rest as the best model has it
      const others = factors.filter((name) => name !== factor);
      const same = rows.filter((row) => row.seed === best.seed && others.every((name) => row[name] === best[name]));
      if (same.length > 1) put(factor, same.sort((a, b) => (a[factor] > b[factor] ? 1 : -1)), "a setting's values");
    }
    const cells = new Map();
    for (const row of rows) cells.set(row.cell, [...(cells.get(row.cell) ?? []), row]);
    for (const [cell, list] of cells) if (cell && list.length > 1) put(cell, list.sort((a, b) => a.seed - b.seed), "the seeds of");
    return options;
  };
  const chosen = () => (groups().find((one) => one.key === which.value) ?? groups()[0])?.list ?? [];
  const refresh = () => {
    const rows = models();
    section.hidden = !rows.length;
    if (!rows.length) return;
    const options = groups();
    const now = options.map((one) => one.title).join("|");
    if (now !== pool) {
      const before = options.some((one) => one.key === which.value) ? which.value : null;
      pool = now;
      const option = (one) => make("option", { value: one.key, textContent: one.title });
      const named = [...new Set(options.map((one) => one.group))].filter(Boolean);
      which.replaceChildren(...options.filter((one) => !one.group).map(option),
        ...named.map((label) => make("optgroup", { label }, ...options.filter((one) => one.group === label).map(option))));
      if (before) which.value = before;
    }
    find(".blind").disabled = Boolean(stopping) || chosen().length < 2;
  };
  const follow = (changed) => {
    if (!changed.includes("ticked")) return;
    refresh();
    const ticked = groups().find((one) => one.title.startsWith("ticked"));
    if (ticked) which.value = ticked.key;
    refresh();
  };

  // --- asking

  const say = (problem) => { find(".problem").textContent = problem; };
  const values = () => {
    const value = (name) => (form.elements.namedItem(name).value === "" ? null : Number(form.elements.namedItem(name).value));
    return { prompt: form.elements.prompt.value, temperature: value("temperature") ?? 0.8, top_k: value("top_k"), top_p: value("top_p"), seed: value("seed") ?? 1, length: value("length") ?? 160 };
  };
  const post = (name, content, signal) =>
    ask(`/api/${number}/${name}`, { method: "POST", body: JSON.stringify(content), headers: { "content-type": "application/json" }, signal });
  const lines = async function* (answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { value, done } = await reader.read();
      if (done) return;
      const pieces = (rest + value).split("\n");
      rest = pieces.pop();
      for (const piece of pieces) yield JSON.parse(piece);
    }
  };
  const busy = (yes) => {
    find(".write").hidden = yes;
    find(".stop").hidden = !yes;
    section.classList.toggle("writing", yes);
    find(".share").disabled = yes || !written.length;
    refresh();
  };

  // --- a card: what one model writes

  const makeCard = (title, about, prompt) => {
    const place = make("pre", {}, make("b"));
    const mean = make("span", { className: "mean" });
    const card = make("article", { className: "sample pen" }, make("h3", {}, make("span", { textContent: title }), mean), make("p", { textContent: about }), place);
    let [sum, count, last] = [0, 0, null];
    place.firstElementChild.textContent = prompt;
    return {
      card,
      prompt: (surprises) => { // character by character, where a token is one
        const letters = [...prompt];
        if (surprises.length === letters.length) place.firstElementChild.replaceChildren(...letters.map((letter, k) => make("i", { className: `s${band(surprises[k])}`, textContent: letter })));
      },
      add: (piece, surprise) => {
        [sum, count] = [sum + surprise, count + 1];
        const step = band(surprise);
        if (last?.dataset.step === String(step)) last.append(piece);
        else { last = make("i", { className: `s${step}`, textContent: piece }); last.dataset.step = step; place.append(last); }
        mean.textContent = `${(sum / count).toFixed(2)} nats`;
        mean.title = "mean surprise of what it wrote, nats per token";
      },
    };
  };
  const about = (row) => {
    const { factors } = stateNow();
    const settings = [...factors, "seed"].map((name) => `${name} ${row[name]}`).join(", ");
    return `${row.best_val_loss === null ? "" : `validation loss ${row.best_val_loss.toFixed(4)} · `}${settings}`;
  };

  const write = async (path, rows, pens, begun = () => {}) => {
    const content = { ...values(), experiments: rows.map((row) => row.id) };
    stopping = new AbortController();
    busy(true);
    say("");
    try {
      const stacks = [];
      for await (const line of lines(await post(path, content, stopping.signal))) {
        if (line.problem) throw new Error(line.problem);
        if (line.texts || line.comparison) begun(line);
        else if (line.experiments) {
          stacks.push(line.experiments);
          line.experiments.forEach((key, k) => pens.get(key).prompt(line.prompt[k]));
        } else if (line.pieces) line.pieces.forEach((piece, k) => pens.get(stacks[line.stack][k]).add(piece, line.surprises[k]));
      }
      return true;
    } catch (problem) {
      if (problem.name !== "AbortError") say(problem.message);
      return false;
    } finally {
      stopping = null;
      busy(false);
    }
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (stopping) return;
    const rows = chosen();
    const pens = new Map(rows.map((row) => [row.id, makeCard(row.short, about(row), form.elements.prompt.value)]));
    cards.replaceChildren(...[...pens.values()].map((pen) => pen.card));
    cards.classList.remove("blinded", "pair");
    verdict.hidden = true;
    written = [];
    write("sample", rows, pens, ({ texts }) => { written = rows.map((row) => texts[row.id]); });
  });
  find(".stop").addEventListener("click", () => stopping?.abort());
  form.elements.prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); }
  });
  which.addEventListener("change", refresh);

  // --- blind: which of the two is better?

  const told = ({ answers, lower_loss: { better, of, interval } }) => {
    const share = interval ? `, ${Math.round((100 * better) / of)}% (95%: ${interval.map((end) => Math.round(100 * end)).join(" to ")}%)` : "";
    return `${answers} answer${answers === 1 ? "" : "s"} so far. Of ${of} that preferred one, ${better} preferred the model with the lower validation loss${share}.`;
  };
  const compare = async () => {
    if (stopping) return;
    const rows = chosen();
    const prompt = form.elements.prompt.value;
    const pens = new Map([["left", makeCard("Left", "?", prompt)], ["right", makeCard("Right", "?", prompt)]]);
    cards.replaceChildren(...[...pens.values()].map((pen) => pen.card));
    cards.classList.add("blinded", "pair");
    verdict.hidden = true;
    written = [];
    let key = null;
    if (!(await write("compare", rows, pens, ({ comparison }) => { key = comparison; })) || !key) return;
    const answer = (text, better) => {
      const button = make("button", { type: "button", textContent: text });
      button.dataset.better = better;
      button.addEventListener("click", async () => {
        try {
          const { left, right, tally } = await (await post("answer", { comparison: key, better })).json();
          cards.classList.remove("blinded");
          for (const [side, id] of [["left", left], ["right", right]]) {
            const row = stateNow().rows.find((one) => one.id === id);
            const { card } = pens.get(side);
            card.querySelector("h3 span").textContent = row.short;
            card.querySelector("p").textContent = about(row);
            card.classList.toggle("better", better === side);
          }
          const next = make("button", { type: "button", className: "next", textContent: "Next pair" });
          next.addEventListener("click", compare);
          verdict.replaceChildren(make("p", { className: "tally", textContent: told(tally) }), next);
        } catch (problem) { say(problem.message); }
      });
      return button;
    };
    verdict.replaceChildren(make("p", { textContent: "Which of the two is better?" }), answer("Left", "left"), answer("Neither", "neither"), answer("Right", "right"));
    verdict.hidden = false;
  };
  find(".blind").addEventListener("click", compare);

  // --- share: today's page with these texts, as a file

  find(".share").addEventListener("click", async () => {
    const button = find(".share");
    button.disabled = true;
    button.textContent = "Making the page …";
    try {
      const file = await (await post("share", { texts: written })).blob();
      const link = make("a", { href: URL.createObjectURL(file), download: `${stateNow().title}.html` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    } catch (problem) { say(problem.message); }
    button.textContent = "Share";
    button.disabled = false;
  });

  return { refresh, follow };
};
