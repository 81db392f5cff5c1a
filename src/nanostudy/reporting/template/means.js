// Means and changes among the experiments that are shown, for figures of all experiments' means: plain, without intervals.

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

const finished = (rows, measure) => rows.filter((row) => row.status === "finished" && typeof row[measure] === "number");

// A figure's rows {column, from, to}, each with the change of the mean between two values of a setting: matched, that is
// averaged over all combinations of the other settings and the seed that have both. Where there is none, the row is left out.
export const changes = (figure, rows, measure, settings) => figure.flatMap((one) => {
  const others = settings.filter((name) => name !== one.column);
  if (others.length === settings.length) return [];
  const groups = new Map();
  for (const row of finished(rows, measure)) {
    const side = row[one.column] === one.from ? 0 : row[one.column] === one.to ? 1 : null;
    if (side === null) continue;
    const key = JSON.stringify(others.map((name) => row[name]));
    if (!groups.has(key)) groups.set(key, [[], []]);
    groups.get(key)[side].push(row[measure]);
  }
  const apart = [...groups.values()].filter(([a, b]) => a.length && b.length).map(([a, b]) => mean(b) - mean(a));
  if (!apart.length) return [];
  const effect = mean(apart);
  return [{ ...one, effect, low: null, high: null, text: `${effect > 0 ? "+" : ""}${effect.toFixed(3)} (no interval)`.replace("-", "−") }];
});

// A figure's rows {a, b}, each with the mean at these values of two settings.
export const means = (figure, rows, measure, [first, second]) => figure.flatMap((one) => {
  const values = finished(rows, measure).filter((row) => String(row[first]) === one.a && String(row[second]) === one.b).map((row) => row[measure]);
  return values.length ? [{ ...one, mean: mean(values), low: null, high: null, n: values.length }] : [];
});
