// Lines over the chosen axis: several runs, a legend that hides and shows, a cursor for the pointer and the arrow keys.

const LEFT = 58, RIGHT = 14, TOP = 20, BOTTOM = 34;

// series: [{run, kind, name, x, y, sx, sy, bad, dots}]; runs are coloured, kinds (training, validation) are hidden one by one.
function lineChart({ id, title, note, series, format = short, height = 230, wide = false, canLog = false, zero = false, events = [] }) {
  const present = series.filter(s => s.x.length || s.bad);
  const shown = present.filter(s => !state.hidden.has(`run:${s.run}`) && !state.hidden.has(`${id}/${s.kind}`));
  const width = pageWidth(wide), log = canLog && state.log.has(id);
  const scale = scales(shown, width, height, log, zero, format);
  const readout = el("p", { class: "readout", "aria-live": "polite", id: `${id}-readout` });
  const cursor = svg("g", { class: "cursor" });
  const picture = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, id: `${id}-picture`, class: "lines",
    "aria-label": `${title}. ${summary(shown, format)} Use the left and right arrow keys to read values.`,
    "aria-describedby": `${id}-readout`,
  }, axes(scale, width, height, format), marks(events, scale), shown.map(s => drawn(s, scale, log)), cursor);
  follow(picture, cursor, readout, shown, scale, width, height, format);
  return figure(id, title, note, legend(id, present, canLog), picture, readout,
    folded(`${id}-table`, "Numbers", () => numbers(title, shown, format)));
}

function scales(shown, width, height, log, zero, format) {
  const xs = shown.flatMap(s => [s.x[0], s.x[s.x.length - 1]]).filter(x => x !== undefined);
  let ys = shown.flatMap(s => s.y).filter(y => y !== null && (!log || y > 0));
  if (!ys.length) ys = [0.1, 1];
  let low = ys.reduce((a, b) => Math.min(a, b)), high = ys.reduce((a, b) => Math.max(a, b));
  if (zero && !log) [low, high] = [Math.min(0, low), high || 0.01];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const margin = log || (zero && low === 0) ? 0 : (high - low) * 0.04;
  [low, high] = log ? [low / 1.1, high * 1.1] : [low - margin, high + (high - low) * 0.04];
  const first = xs.length ? Math.min(...xs) : 0, end = xs.length ? Math.max(...xs) : 1;
  const last = end > first ? end : first + (state.axis === "step" ? 1 : Math.abs(first) || 1);
  const place = log ? y => Math.log(y / low) / Math.log(high / low) : y => (y - low) / (high - low);
  return {
    first, last,
    x: step => LEFT + (step - first) / (last - first) * (width - LEFT - RIGHT),
    y: value => height - BOTTOM - place(value) * (height - TOP - BOTTOM),
    step: x => first + (x - LEFT) / (width - LEFT - RIGHT) * (last - first),
    ticks: log ? logTicks(low, high) : ticks(low, high, Math.round(height / 46)),
  };
}

function axes(scale, width, height, format) {
  const lines = scale.ticks.map(y => [
    svg("line", { class: "rule", x1: LEFT, x2: width - RIGHT, y1: scale.y(y), y2: scale.y(y) }),
    svg("text", { class: "tick", x: LEFT - 7, y: scale.y(y) + 4, "text-anchor": "end" }, format(y))]);
  const steps = ticks(scale.first, scale.last, Math.max(4, Math.floor(width / 80))).filter(step => state.axis !== "step" || Number.isInteger(step)).map(step =>
    svg("text", { class: "tick", x: scale.x(step), y: height - BOTTOM + 17, "text-anchor": "middle" }, axisTick(step)));
  return [lines, steps, svg("text", { class: "tick", x: width - RIGHT, y: height - 4, "text-anchor": "end" }, state.axis === "step" ? "step" : axisName())];
}

function drawn(series, scale, log) {
  const colour = runColour(series.run), points = (x, y) => x.map((step, i) => [step, y[i]]).filter(p => !log || p[1] > 0);
  const path = (x, y) => points(x, y).map((p, i) => `${i ? "L" : "M"}${scale.x(p[0]).toFixed(1)} ${scale.y(p[1]).toFixed(1)}`).join("");
  const dash = series.dots ? "5 4" : runDash(series.run);
  const wide = { fill: "none", stroke: colour, "stroke-width": 2, "stroke-dasharray": dash, "stroke-linejoin": "round" };
  return svg("g", { class: "series", "data-run": series.run, "data-kind": series.kind },
    svg("title", {}, series.name),
    series.sx
      ? [svg("path", { ...wide, d: path(series.x, series.y), "stroke-width": 1, opacity: 0.3, "stroke-dasharray": null }),
        svg("path", { ...wide, d: path(series.sx, series.sy) })]
      : svg("path", { ...wide, d: path(series.x, series.y) }),
    series.dots && series.x.length <= 60
      ? points(series.x, series.y).map(p => svg("circle", { cx: scale.x(p[0]), cy: scale.y(p[1]), r: 3.2, fill: colour })) : null,
    (series.bad || []).map(step => svg("text", { class: "notfinite", x: scale.x(step), y: scale.y(scale.ticks[0]) - 4, "text-anchor": "middle" },
      "x", svg("title", {}, `${series.name}: not a finite number at ${axisText(step)}`))));
}

// Checkpoints, restarts and trouble above the lines; those that would lie on one another are one.
function marks(events, scale) {
  const seen = new Set();
  const placed = events.map(event => ({ ...event, at: event.step === null ? null : placeOf(chosenRun(), event.step) }));
  return placed.filter(event => event.at !== null && event.at >= scale.first && event.at <= scale.last).map(event => {
    const x = Math.round(scale.x(event.at)), kind = eventKind(event), key = `${kind}${Math.round(x / 4)}`;
    if (seen.has(key)) return null;
    seen.add(key);
    const shape = { checkpoint: `M${x - 4} 5h8l-4 6z`, restart: `M${x - 5} 12h10l-5 -9z`, trouble: `M${x - 4} 4l8 8m0 -8l-8 8`, other: `M${x} 4v8` };
    return svg("g", { class: `mark ${kind}` }, svg("path", { d: shape[kind] }),
      kind === "trouble" || kind === "restart" ? svg("line", { x1: x, x2: x, y1: 14, y2: scale.y(scale.ticks[0]) }) : null,
      svg("title", {}, `step ${event.step}: ${event.kind} ${event.text}`));
  });
}

function eventKind(event) {
  if (event.trouble) return "trouble";
  return event.kind === "checkpoint" ? "checkpoint" : event.kind === "resume" ? "restart" : "other";
}

function legend(id, series, canLog) {
  const runs = [...new Set(series.map(s => s.run))], kinds = [...new Set(series.map(s => s.kind))];
  const button = (key, name, sample) => el("button", {
    type: "button", class: "chip", id: `${id}-legend-${key}`, "aria-pressed": String(!state.hidden.has(key)),
    onclick: () => { toggle(state.hidden, key); redraw(); },
  }, sample, name);
  const buttons = [
    runs.length > 1 ? runs.map(run => button(`run:${run}`, state.data.runs[run].name, swatch(runColour(run), runDash(run)))) : [],
    kinds.length > 1 ? kinds.map(kind => {
      const one = series.find(s => s.kind === kind);
      return button(`${id}/${kind}`, kind, swatch(runs.length > 1 ? "currentColor" : runColour(one.run), one.dots ? "5 4" : null));
    }) : [],
    canLog ? el("button", {
      type: "button", class: "chip", id: `${id}-log`, "aria-pressed": String(state.log.has(id)),
      onclick: () => { toggle(state.log, id); redraw(); },
    }, "logarithmic") : [],
  ].flat();
  return buttons.length ? el("div", { class: "legend", role: "group", "aria-label": "Shown lines" }, buttons) : null;
}

function swatch(colour, dash) {
  return svg("svg", { class: "swatch", viewBox: "0 0 22 8", "aria-hidden": "true" },
    svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: colour, "stroke-width": 3, "stroke-dasharray": dash }));
}

function toggle(set, key) {
  if (!set.delete(key)) set.add(key);
}

// The value of a series at the nearest step that it has.
function nearest(series, step) {
  const x = series.x;
  let low = 0, high = x.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] < step) low = middle; else high = middle;
  }
  return step - x[low] <= x[high] - step ? low : high;
}

function follow(picture, cursor, readout, shown, scale, width, height, format) {
  const lines = shown.filter(s => s.x.length);
  const steps = lines.length ? lines.reduce((a, b) => a.x.length >= b.x.length ? a : b).x : [];
  let at = steps.length - 1;
  const id = picture.id;
  const show = (index, mark) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    if (mark) state.cursors.set(id, at);
    const step = steps[at];
    const values = lines.map(s => [s, nearest(s, step)]);
    readout.textContent = steps.length ? `${axisText(step)}: ${values.map(([s, i]) => `${s.name} ${format(s.y[i])}${s.x[i] === step ? "" : ` (at ${state.axis === "step" ? whole(s.x[i]) : axisText(s.x[i])})`}`).join(", ")}` : "nothing to show";
    cursor.replaceChildren(...(mark && steps.length ? [
      svg("line", { x1: scale.x(step), x2: scale.x(step), y1: TOP, y2: height - BOTTOM }),
      ...values.map(([s, i]) => svg("circle", { cx: scale.x(s.x[i]), cy: scale.y(s.y[i]), r: 4, fill: runColour(s.run) }))] : []));
  };
  if (state.cursors.has(id)) show(state.cursors.get(id), true);
  else show(at, false);
  const leave = () => {
    if (state.redrawing) return;
    state.cursors.delete(id);
    cursor.replaceChildren();
  };
  picture.addEventListener("pointermove", event => {
    const box = picture.getBoundingClientRect();
    show(nearest({ x: steps }, scale.step((event.clientX - box.left) / box.width * width)), true);
  });
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("blur", leave);
  picture.addEventListener("keydown", event => {
    const stride = Math.max(1, Math.round(steps.length / 60)) * (event.shiftKey ? 5 : 1);
    const to = { ArrowLeft: at - stride, ArrowRight: at + stride, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to, true);
  });
}

function summary(shown, format) {
  return shown.filter(s => s.y.length).map(s => `${s.name}: from ${format(s.y[0])} to ${format(s.y[s.y.length - 1])}.`).join(" ");
}

// A dozen steps of each line.
function numbers(title, shown, format) {
  const lines = shown.filter(s => s.x.length);
  if (!lines.length) return el("p", {}, "Nothing is shown.");
  const longest = lines.reduce((a, b) => a.x.length >= b.x.length ? a : b).x, rows = Math.min(12, longest.length);
  const steps = [...new Set(Array.from({ length: rows }, (_, i) => longest[Math.round(i * (longest.length - 1) / Math.max(1, rows - 1))]))];
  return table(title, [state.axis === "step" ? "step" : axisName(), ...lines.map(s => s.name)],
    steps.map(step => [state.axis === "step" ? whole(step) : axisTick(step), ...lines.map(s => format(s.y[nearest(s, step)]))]));
}
