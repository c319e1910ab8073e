// Several runs beside each other: what differs in their settings, then what came of it. One line each, however many there are.

const MANY = 3;  // more runs than these are folded

const NOT_COMPARED = key => key.startsWith("run.") || key.startsWith("launch.") || key === "sample.prompt";

function differing(runs) {
  const maps = runs.map(run => new Map(run.settings.map(row => [row.key, row.value])));
  const keys = [...new Set(maps.flatMap(map => [...map.keys()]))].filter(key => !NOT_COMPARED(key) && new Set(maps.map(map => map.get(key))).size > 1);
  return keys.map(key => [key, maps.map(map => map.get(key) ?? "-")]);
}

const RESULTS = [
  ["steps", run => whole(run.steps)], ["loss", run => short(run.facts.loss)], ["validation", run => short(run.facts.validation_loss)],
  ["bits per byte", run => short(run.facts.bits_per_byte)], ["tokens/s", run => short(run.facts.tokens_per_second)],
  ["load", run => typeof run.facts.load === "number" ? times(run.facts.load) : "-"],
  ["memory", run => typeof run.facts.memory_gb === "number" ? `${trimmed(run.facts.memory_gb, 3)} GB` : "-"], ["verdict", run => ["bad", "watch", "good"].filter(level => run.verdict.some(remark => remark.level === level)).map(level => WORDS[level])[0] || "-"],
  ["end", run => run.state],
];

function comparison() {
  const runs = state.data.runs;
  if (runs.length < 2) return null;
  const settings = differing(runs), results = RESULTS.filter(([, value]) => runs.some(run => value(run) !== "-"));
  const rows = runs.map((run, i) => [el("span", {}, swatch(runColour(i), runDash(i)), run.name),
    ...settings.map(([, values]) => values[i]), ...results.map(([, value]) => value(run))]);
  return el("div", { id: "comparison" },
    el("p", { class: "note" }, ["No setting differs", "One setting differs"][settings.length] || `${settings.length} settings differ`, "; load is that of the busiest expert of the worst layer, the median of the steps"),
    table("Runs: settings that differ, and results", ["run", ...settings.map(([key]) => key.replaceAll(".", ".\u200b")), ...results.map(([name]) => name)], rows),
    parallelAxes());
}

// Where the parts of the page are.
function contents(parts) {
  return el("nav", { id: "contents", "aria-label": "Contents" }, parts.map(part => {
    const [first] = part.getElementsByTagName("h2");
    return el("a", { href: `#${part.id}` }, first.textContent);
  }));
}

// What the models wrote, the newest open.
function samples() {
  const runs = state.data.runs.filter(run => run.samples.length);
  if (!runs.length) return null;
  const text = sample => el("pre", { class: "sample" }, el("b", {}, sample.prompt), sample.text);
  return section("samples", "Samples", runs.map(run => {
    const earlier = run.samples.slice(0, -1).reverse(), last = run.samples[run.samples.length - 1], i = state.data.runs.indexOf(run);
    return [el("p", { class: "note" }, `${state.data.runs.length > 1 ? `${run.name}, ` : ""}step ${whole(last.step)}; the prompt is bold`), text(last),
      earlier.length ? folded(`samples-${i}`, `${earlier.length} earlier`, () =>
        el("div", {}, earlier.map(sample => [el("p", { class: "note" }, `step ${whole(sample.step)}`), text(sample)]))) : null];
  }));
}

const gigabytes = value => value === null || value === undefined ? "-" : `${trimmed(value, 3)} GB`;

// The mean of the ranks, of runs in which it is not the only rank's own value.
function means(name) {
  const same = line => { const worst = state.data.runs[line.run].series[name.replace(/_mean$/, "")]; return worst && worst.y.every((y, i) => y === line.y[i]); };
  return series(name, "mean of ranks", { dots: true }).filter(line => !same(line));
}

function machine() {
  const charts = [
    chart({
      id: "memory", title: "Memory, peak", note: "The most that a rank has had, on a CPU of its process", zero: true, format: gigabytes,
      series: [...series("system/memory_peak_gb", "worst rank"), ...means("system/memory_peak_gb_mean")],
    }),
    chart({ id: "memory_share", title: "Memory, share of the device", note: "The most that was taken; on a CPU of a rank's part of the host", zero: true, format: percent, series: series("system/memory_share", "share") }),
    chart({
      id: "memory_now", title: "Memory in use", note: "Worst rank, when the step was logged", zero: true, format: gigabytes,
      series: [...series("system/memory_reserved_gb", "reserved"), ...series("system/memory_allocated_gb", "tensors", { dots: true }), ...series("system/memory_resident_gb", "process")],
    }),
    chart({
      id: "waits", title: "Waiting", note: "Share of the time of training", zero: true, format: percent,
      series: [...series("data_wait_fraction", "for data"), ...series("perf/exchange_fraction", "in collectives"), ...series("perf/host_wait_fraction", "host for the device")],
    })].filter(each => each);
  return charts.length ? section("machine", "Memory and waiting", el("div", { class: "grid" }, charts)) : null;
}
