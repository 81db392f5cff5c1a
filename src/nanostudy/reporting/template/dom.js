// Elements, and values as text.

export const all = (selector, within = document) => [...within.querySelectorAll(selector)];

export const byId = (id) => document.getElementById(id);

// "light" or "dark": what a reader chose, or the system has.
export const scheme = () => document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");

export const make = (tag, settings = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), settings);
  element.append(...children);
  return element;
};

export const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

// `decimals` by measure: null for counts, nothing for settings, whose values are as they are typed.
export const valueText = (key, value, decimals) => {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  if (decimals[key] === undefined) return String(Number(value.toPrecision(6)));
  if (decimals[key] !== null) return value.toFixed(decimals[key]).replace("-", "−");
  return Math.abs(value) >= 1e9 ? value.toExponential(2) : whole.format(value);
};

export const rowsOf = ({ columns, rows }) => rows.map((row) => Object.fromEntries(columns.map((name, k) => [name, row[k]])));
