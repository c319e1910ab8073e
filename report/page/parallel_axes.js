// Parallel coordinates of a sweep: an axis for each setting that differs, then what came of it; a line for each run, coloured by its loss.

const FEWEST_RUNS = 3, MOST_SETTINGS = 16, DECADE = 10, ROW = 56;
const isNumber = value => typeof value === "number" && Number.isFinite(value);

// Null where there are too few runs to compare. Runs that failed or have no loss are only counted.
function parallelAxes() {
  const all = state.data.runs.map((run, index) => ({ run, index })), alive = all.filter(({ run }) => !run.failed);
  const measure = alive.some(({ run }) => isNumber(run.facts.validation_loss)) ? "validation_loss" : "loss";
  const drawn = alive.filter(({ run }) => isNumber(run.facts[measure])).sort((a, b) => a.run.facts[measure] - b.run.facts[measure]);
  const settings = sweptSettings(drawn.map(({ run }) => run)), name = measure.replace("_", " ");
  if (all.length < FEWEST_RUNS || drawn.length < 2 || !settings.length) return null;
  const outcomes = [[name, measure, short], ["tokens/s", "tokens_per_second", short], ["imbalance", "load", times]];
  const axes = [
    ...settings.slice(0, MOST_SETTINGS).map(([key, values]) => settingAxis(key, values, settings.map(([other]) => other))),
    ...outcomes.map(([title, fact, format]) => numberAxis(title, title, drawn.map(({ run }) => isNumber(run.facts[fact]) ? run.facts[fact] : null), format)),
  ].filter(axis => axis.texts.some(text => text !== "-"));
  const left = all.length - drawn.length + state.data.without_run, more = settings.length - MOST_SETTINGS;
  const note = [
    `A line for each run, coloured by its ${name}; point at it to read it`,
    left ? `not drawn: ${left} that failed or ${left > 1 ? "have" : "has"} no ${name}` : null,
    drawn.some(({ run }) => run.state !== "finished") ? "dashed: not finished" : null,
    more > 0 ? `${more} more settings differ, in the table above` : null,
  ].filter(text => text).join("; ");
  return parallelFigure(drawn, axes, note, rank => short(drawn[rank].run.facts[measure]));
}

// What the user varied, where all runs are points of sweeps; else every setting that differs, as model=tiny,default changes many.
function sweptSettings(runs) {
  if (!runs.every(run => run.swept)) return runs.length ? differing(runs) : [];
  const keys = [...new Set(runs.flatMap(run => Object.keys(run.swept)))];
  return keys.map(key => [key, runs.map(run => run.swept[key] ?? "-")]).filter(([, values]) => new Set(values).size > 1);
}

// Numbers are placed by their size, other values one beside the other.
function settingAxis(key, values, keys) {
  const words = key.split("."), title = words.map((_, i) => words.slice(-1 - i).join("."))
    .find(tail => keys.filter(other => `.${other}`.endsWith(`.${tail}`)).length === 1) || key;
  const numbers = values.map(value => value.trim() === "" ? NaN : Number(value));
  if (numbers.every(isNumber)) return { ...numberAxis(title, key, numbers, value => values[numbers.indexOf(value)] ?? short(value)), texts: values };
  const names = [...new Set(values)].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const place = name => (names.indexOf(name) + 0.5) / names.length;
  return { title, key, texts: values, places: values.map(place), marks: names.map(name => ({ place: place(name), text: name.length > 18 ? `${name.slice(0, 17)}\u2026` : name })) };
}

function numberAxis(title, key, values, format) {
  const known = values.filter(value => value !== null), low = Math.min(...known), high = Math.max(...known);
  const log = low > 0 && high / low >= DECADE, few = [...new Set(known)].sort((a, b) => a - b);
  const place = value => low === high ? 0.5 : log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  const marked = few.length <= 6 ? few : [low, ...(log ? logTicks(low, high) : ticks(low, high, 5)), high];
  return {
    title, log, key, texts: values.map(value => value === null ? "-" : format(value)),
    places: values.map(value => value === null ? null : place(value)), marks: marked.map(value => ({ place: place(value), text: format(value) })),
  };
}

// Axes stand beside each other, or lie below each other where the page is too narrow for their names.
function parallelFigure(drawn, axes, note, lossOf) {
  const width = pageWidth(true), lying = width / axes.length < 100, height = lying ? ROW * axes.length + 8 : 300;
  const [begin, end] = lying ? [16, width - 16] : [height - 14, 44];
  const along = i => lying ? ROW * i + 30 : 50 + i * (width - 110) / (axes.length - 1), across = place => begin + place * (end - begin);
  const at = (i, place) => lying ? [across(place), along(i)] : [along(i), across(place)];
  const readout = el("p", { class: "readout", "aria-live": "polite", id: "parallel-readout" });
  const shown = drawn.map((each, rank) => ({ ...each, rank, points: axes.map((axis, i) => axis.places[rank] === null ? null : at(i, axis.places[rank])) }))
    .filter(({ index }) => !state.hidden.has(`run:${index}`));
  const lines = shown.map(each => parallelLine(each, drawn.length));
  const picture = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, id: "parallel-picture", class: "lines parallel", "aria-describedby": "parallel-readout",
    "aria-label": `${drawn.length} runs over ${axes.map(axis => axis.title).join(", ")}. Use the arrow keys to go from run to run, the lowest loss first.`,
  }, axes.map((_, i) => svg("line", { class: "rule", x1: at(i, 0)[0], y1: at(i, 0)[1], x2: at(i, 1)[0], y2: at(i, 1)[1] })), [...lines].reverse(),
  axes.map((axis, i) => parallelLabels(axis, at(i, 0), at(i, 1), place => at(i, place), lying)));
  const tell = rank => `${drawn[rank].run.name}: ${axes.map(axis => `${axis.title} ${axis.texts[rank]}`).join(", ")}`;
  followRuns(picture, readout, shown, lines, ({ rank }) => tell(rank), lying);
  const ends = [0, Math.floor((drawn.length - 1) / 2), drawn.length - 1].filter((rank, i, all) => all.indexOf(rank) === i);
  return figure("parallel", "Settings and results of the runs", note, picture, readout,
    colourScale(ends.map(rank => [lossOf(rank), rankColour(rank, drawn.length)])));
}

function parallelLine({ run, index, rank, points }, count) {
  const d = points.map((point, i) => point ? `${i && points[i - 1] ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}` : "").join("");
  return svg("g", { class: "series", "data-run": index }, svg("title", {}, run.name),
    svg("path", { d, stroke: `rgb(${rankColour(rank, count)})`, "stroke-dasharray": run.state === "finished" ? null : "5 4" }));
}

// The values of an axis that have room, its ends first.
function parallelLabels(axis, begin, end, at, lying) {
  const texts = axis.marks.map(({ place, text }) => {
    const [x, y] = at(place), anchor = !lying ? "start" : x < begin[0] + 24 ? "start" : x > end[0] - 24 ? "end" : "middle";
    const left = x - { start: 0, middle: 3.4, end: 6.8 }[anchor] * text.length;
    return { x, y, text, anchor, from: lying ? left : y - 7, to: lying ? left + 6.8 * text.length + 6 : y + 7 };
  }), kept = [];
  for (const each of [texts[texts.length - 1], ...texts]) if (kept.every(other => each.to <= other.from || each.from >= other.to)) kept.push(each);
  const name = { class: "tick name", x: lying ? begin[0] : end[0], y: lying ? begin[1] - 8 : 20, "text-anchor": lying ? "start" : "middle" };
  return svg("g", { class: "axis" },
    kept.map(({ x, y, text, anchor }) => [svg("circle", { class: "dot", cx: x, cy: y, r: 2.5 }),
      svg("text", { class: "tick", x: lying ? x : x + 6, y: lying ? y + 15 : y + 4, "text-anchor": anchor }, text)]),
    svg("text", name, axis.log ? `${axis.title}, log` : axis.title, svg("title", {}, axis.key)));
}

// The pointer names the line next to it, the keys go through the runs in the order of their losses.
function followRuns(picture, readout, shown, lines, tell, lying) {
  let chosen = 0;
  const show = (to, mark) => {
    chosen = Math.max(0, Math.min(shown.length - 1, to));
    if (mark) state.cursors.set(picture.id, chosen);
    readout.textContent = shown.length ? tell(shown[chosen]) : "nothing to show";
    picture.classList.toggle("choosing", mark && shown.length > 0);
    lines.forEach((line, i) => line.classList.toggle("chosen", mark && i === chosen));
  };
  show(state.cursors.get(picture.id) || 0, state.cursors.has(picture.id));
  const leave = () => {
    if (state.redrawing) return;
    state.cursors.delete(picture.id);
    show(chosen, false);
  };
  picture.addEventListener("pointermove", event => {
    const box = picture.getBoundingClientRect(), scale = picture.viewBox.baseVal.width / box.width;
    const [along, across] = lying ? [event.clientY - box.top, event.clientX - box.left] : [event.clientX - box.left, event.clientY - box.top];
    show(nearestLine(shown, along * scale, across * scale, lying), true);
  });
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("blur", leave);
  picture.addEventListener("keydown", event => {
    const to = { ArrowLeft: chosen - 1, ArrowUp: chosen - 1, ArrowRight: chosen + 1, ArrowDown: chosen + 1, Home: 0, End: shown.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(picture.classList.contains("choosing") ? to : { Home: 0, End: shown.length - 1 }[event.key] ?? chosen, true);
  });
}

function nearestLine(shown, along, across, lying) {
  const turned = point => lying ? [point[1], point[0]] : point;
  const gap = ({ points }) => {
    const known = points.filter(point => point).map(turned), i = Math.max(1, known.findIndex(point => point[0] >= along));
    const [a, b] = along > known[known.length - 1][0] ? [known[known.length - 1], known[known.length - 1]] : [known[i - 1], known[i]];
    const part = b[0] === a[0] ? 0 : Math.max(0, Math.min(1, (along - a[0]) / (b[0] - a[0])));
    return Math.abs(a[1] + part * (b[1] - a[1]) - across);
  };
  return shown.map(gap).reduce((best, value, i, all) => value < all[best] ? i : best, 0);
}
