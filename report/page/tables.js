// Events, configuration and parameters.

function events() {
  const run = chosenRun();
  const rows = run.events.map(event => [event.step === null ? "-" : whole(event.step), event.kind, event.time.slice(0, 19).replace("T", " "), event.text]);
  if (!rows.length) return null;
  return section("events", "Events", timeline(run),
    folded("events-all", `All ${rows.length} of ${run.name}`, () => table("Events", ["step", "event", "time (UTC)", ""], rows, false)));
}

// The kinds of events as rows on the axis of steps.
function timeline(run) {
  const placed = run.events.filter(event => event.step !== null), kinds = [...new Set(placed.map(event => event.kind))];
  const width = pageWidth(true), height = 22 * kinds.length + 24, last = Math.max(run.steps, ...placed.map(event => event.step), 1);
  const left = 124, x = step => left + step / last * (width - left - 20);
  return figure("timeline", "Events over time", null, svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "lines", role: "img", "aria-label": `Events: ${kinds.join(", ")}` },
    kinds.map((kind, row) => {
      const y = 22 * row + 12;
      return svg("g", {}, svg("line", { class: "rule", x1: left, x2: width - 20, y1: y, y2: y }),
        svg("text", { class: "tick", x: left - 8, y: y + 4, "text-anchor": "end" }, kind.slice(0, 18)),
        placed.filter(event => event.kind === kind).map(event => svg("circle", { class: `mark ${eventKind(event)}`, cx: x(event.step), cy: y, r: 4.5 },
          svg("title", {}, `step ${event.step}: ${event.text}`))));
    }),
    ticks(0, last, Math.max(3, Math.floor(width / 130))).filter(Number.isInteger).map(step =>
      svg("text", { class: "tick", x: x(step), y: height - 4, "text-anchor": "middle" }, short(step)))));
}

function configuration() {
  const runs = state.data.runs;
  const changed = runs.map(run => run.settings.filter(row => row.changed));
  const parts = [];
  const defaults = i => changed[i].length ? table("Changed settings", ["setting", "value", "default"], changed[i].map(row => [row.key, row.value, row.default ?? "(unknown)"]), false) : el("p", {}, "Nothing.");
  runs.forEach((run, i) => parts.push(
    runs.length > MANY ? folded(`changed-${i}`, `${run.name}: changed from the defaults`, () => defaults(i))
      : [el("h3", {}, runs.length > 1 ? `${run.name}: changed from the defaults` : "Changed from the defaults"), defaults(i)],
    folded(`settings-${i}`, `All ${run.settings.length} settings`, () => table("Settings", ["setting", "value"], run.settings.map(row => [row.key, row.value]), false))));
  return section("configuration", "Configuration", parts);
}

function parameters() {
  const runs = state.data.runs.filter(run => run.parameters);
  if (!runs.length) return null;
  const shown = runs.filter((run, i) => runs.findIndex(other => JSON.stringify(other.parameters) === JSON.stringify(run.parameters)) === i);
  return section("parameters", "Parameters", shown.map(run => {
    const { total, active, parts } = run.parameters;
    const rows = Object.entries(parts).map(([part, [all, used]]) => [part === "mtp" ? "prediction (not in the sums)" : part, whole(all), whole(part === "mtp" ? 0 : used), percent(all / total)]);
    return [shown.length > 1 ? el("h3", {}, run.name) : null,
      table("Parameters by part", ["part", "total", "active per token", "share"], [...rows, ["all", whole(total), whole(active), percent(active / total) + " active"]])];
  }));
}

function environment() {
  const runs = state.data.runs.filter(run => run.environment.length);
  if (!runs.length) return null;
  const keys = [...new Set(runs.flatMap(run => run.environment.map(([name]) => name)))];
  const maps = runs.map(run => new Map(run.environment));
  return section("environment", "Environment", table("Environment", ["", ...runs.map(run => run.name)], keys.map(name => [name, ...maps.map(map => map.get(name) ?? "-")]), false));
}
