// Expressions over a row's columns, such as `val_loss < 2.0 and dropout == 0`: parsed here, and never run as script.
// A word alone is looked for in names, settings and reasons.

const TOKEN = /\s*(?:(<=|>=|==|!=|[<>=~()[\],])|("[^"]*"|'[^']*')|([-−+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))|([A-Za-z_][\w.]*)|(\S))/y;
const COMPARE = {
  "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b,
  "==": (a, b) => equal(a, b), "!=": (a, b) => !equal(a, b), "~": (a, b) => String(a ?? "").toLowerCase().includes(String(b).toLowerCase()),
};
const equal = (a, b) => (typeof a === "number" && typeof b === "number" ? a === b : String(a ?? "none").toLowerCase() === String(b ?? "none").toLowerCase());

const tokens = (text) => {
  const all = [];
  TOKEN.lastIndex = 0;
  while (/\S/.test(text.slice(TOKEN.lastIndex))) {
    const [whole, sign, quoted, number, word, other] = TOKEN.exec(text);
    const at = TOKEN.lastIndex - whole.trimStart().length;
    if (other) throw new Error(`${other} has no meaning here.`);
    const kind = sign ? "sign" : quoted ? "text" : number ? "number" : "word";
    const value = quoted ? quoted.slice(1, -1) : number ? Number(number.replace("−", "-")) : sign === "=" ? "==" : sign || word;
    all.push({ kind, value, at, end: TOKEN.lastIndex });
  }
  return all;
};

// {test: (row) => boolean, clauses: [{text, columns}]}; the clauses are what `and` joins. Throws an Error that says what is wrong.
export const parse = (text, columns) => {
  const all = tokens(text);
  let next = 0;
  let used = new Set();
  const is = (value) => all[next]?.value === value && all[next].kind !== "text";
  const take = (value) => is(value) && Boolean(next += 1);
  const need = (value) => { if (!take(value)) throw new Error(`${value} is missing${all[next] ? ` before ${all[next].value}` : " at the end"}.`); };

  const operand = () => {
    const token = all[next];
    if (!token || token.kind === "sign") throw new Error(`A column or a value is missing${token ? ` before ${token.value}` : " at the end"}.`);
    next += 1;
    const column = token.kind === "word" && columns.includes(token.value);
    if (column) used.add(token.value);
    return { column, token, of: column ? (row) => row[token.value] : () => token.value };
  };
  const comparison = () => {
    if (take("(")) { const inner = either(); need(")"); return inner; }
    const first = operand();
    if (take("in")) {
      need("[");
      const values = [];
      while (!is("]")) { values.push(operand()); if (!take(",")) break; }
      need("]");
      if (!first.column) throw new Error(`There is no column ${first.token.value}.`);
      return (row) => values.some((value) => equal(first.of(row), value.of(row)));
    }
    const tests = [];
    for (let left = first; all[next]?.kind === "sign" && all[next].value in COMPARE; ) {
      const compare = COMPARE[all[next].value];
      const equality = ["==", "!=", "~"].includes(all[next].value);
      next += 1;
      const [a, b] = [left, operand()];
      if (!a.column && !b.column) throw new Error(`There is no column ${[a, b].find((one) => one.token.kind === "word")?.token.value ?? a.token.value}.`);
      tests.push((row) => (equality || (a.of(row) !== null && b.of(row) !== null)) && compare(a.of(row), b.of(row)));
      left = b;
    }
    if (tests.length) return (row) => tests.every((test) => test(row));
    if (first.column) throw new Error(`${first.token.value} needs a comparison, such as ${first.token.value} == 1.`);
    const wanted = String(first.token.value).toLowerCase();
    used.add("name");
    return (row) => [row.name, row.part, row.status, row.reason, row.cell, row.note].some((part) => String(part ?? "").toLowerCase().includes(wanted));
  };
  const not = () => { if (!take("not")) return comparison(); const inner = not(); return (row) => !inner(row); };
  const clauses = [];
  const both = (outer) => {
    const tests = [];
    const mine = [];
    do {
      const [before, start] = [used, next];
      used = new Set();
      tests.push(not());
      mine.push({ text: text.slice(all[start].at, all[next - 1].end), columns: [...used] });
      used = new Set([...before, ...used]);
    } while (take("and"));
    if (outer) clauses.push(mine);
    return (row) => tests.every((test) => test(row));
  };
  const either = (outer = false) => {
    const tests = [both(outer)];
    while (take("or")) tests.push(both(outer));
    return (row) => tests.some((test) => test(row));
  };

  if (!all.length) return { test: () => true, clauses: [] };
  const test = either(true);
  if (next < all.length) throw new Error(`and, or or a comparison is missing before ${all[next].value}.`);
  return { test, clauses: clauses.length > 1 ? [{ text: `(${text.trim()})`, columns: [...used] }] : clauses[0] };
};

// The text with `clause` in place of its clauses about `column` alone; an empty clause takes them away.
export const narrowed = (text, column, clause, columns) => {
  let kept = [];
  try { kept = parse(text, columns).clauses.filter((one) => one.columns.join() !== column).map((one) => one.text); } catch { /* what has no meaning is replaced */ }
  return [...kept, clause].filter(Boolean).join(" and ");
};

// A value as an expression has it.
export const literal = (value) => (typeof value === "number" ? String(value) : /^[A-Za-z_][\w.]*$/.test(value) ? value : `"${String(value).replaceAll('"', "")}"`);
