// The experts of one run: their load over time, the layers over time, what they specialise in, who works with whom.

function experts() {
  const runs = state.data.runs, run = chosenRun(), found = run.telemetry;
  const picker = runs.length > 1
    ? choice("run", "Run", runs.map((each, i) => [i, each.name]), state.run, value => { state.run = Number(value); state.layer = null; state.frame = null; redraw(); }) : null;
  if (!found) return section("experts", "Experts", picker, balanceLines(), el("p", { class: "note" }, "There is no telemetry.jsonl in this run folder, so nothing more is known of single experts."));
  if (state.layer === null || !found.layers.includes(state.layer)) state.layer = worst(found).layer;
  return section("experts", "Experts", picker, loadMap(found), layerMap(found), balanceLines(), lastTables(found), layerPart(found));
}

function balanceLines() {
  return el("div", { class: "grid" },
    chart({
      id: "balance", title: "Load of the busiest expert", note: "Over an even share: 1 is perfectly even", zero: true,
      series: [...series("moe/load_max_over_mean", "worst layer"), ...series("moe/load_max_over_mean_mean", "mean of layers", { dots: true })],
    }),
    chart({ id: "dropped", title: "Dropped choices", note: "Share of token-expert choices over capacity", series: series("dropped_fraction", "dropped"), format: percent, zero: true }),
    chart({
      id: "entropy", title: "Router entropy", note: "Of a token's probabilities, in nats; low is sure",
      series: [...series("moe/router_entropy", "lowest layer"), ...series("moe/router_entropy_mean", "mean of layers", { dots: true })],
    }),
    chart({ id: "dead", title: "Dead experts", note: "Share of experts without a token for the whole window", series: series("moe/dead_fraction", "dead"), format: percent, zero: true }));
}

const decoders = new WeakMap();
function values(coded) {
  if (!decoders.has(coded)) decoders.set(coded, decoder(coded));
  return decoders.get(coded);
}

// The layer and expert with the most load in the recent records, which the verdict is about.
function worst(found) {
  const frame = frameNames(found).length - 1, at = values(found.load), size = found.layers.length * found.experts;
  let best = 0;
  for (let i = 1; i < size; i++) if ((at(frame * size + i) || 0) > (at(frame * size + best) || 0)) best = i;
  return { layer: found.layers[Math.floor(best / found.experts)], expert: best % found.experts };
}

const frameName = ([first, last]) => first === last ? `step ${whole(first)}` : `steps ${whole(first)} to ${whole(last)}`;
// The frames, and after them, where there are several, the recent records as one.
const frameNames = found => [...found.frames.map(frameName), ...(found.recent ? [`recent: ${frameName(found.recent)}`] : [])];
const indices = count => Array.from({ length: count }, (_, i) => String(i));

function loadMap(found) {
  const at = values(found.load), E = found.experts, size = found.layers.length * E, names = frameNames(found), last = names.length - 1;
  const frame = () => state.frame === null ? last : Math.min(state.frame, last);
  const load = (row, column) => at(frame() * size + row * E + column);
  const busiest = () => {
    let best = [0, 0];
    for (let row = 0; row < found.layers.length; row++)
      for (let column = 0; column < E; column++) if ((load(row, column) || 0) > (load(...best) || 0)) best = [row, column];
    return best;
  };
  const map = heatMap({
    id: "load", label: `Load of ${E} experts in ${found.layers.length} layers, over an even share. Use the arrow keys to read cells, Enter to choose a layer.`,
    rows: found.layers.map(String), columns: indices(E), rowName: "layer", columnName: "expert", value: load, colour: ratioColour, mark: busiest,
    say: (row, column) => `layer ${found.layers[row]}, expert ${column}: ${load(row, column) ? `${times(load(row, column))} an even share` : times(load(row, column))}`,
    pick: chooseLayer(found), chosen: found.layers.indexOf(state.layer),
  });
  const output = el("output", { for: "slider", id: "slider-text" }, names[frame()]);
  const slider = el("input", {
    type: "range", id: "slider", min: 0, max: last, step: 1, value: frame(), disabled: last === 0,
    "aria-valuetext": names[frame()],
  });
  const show = index => {
    state.frame = index >= last ? null : index;
    output.textContent = names[index];
    slider.value = index;
    slider.setAttribute("aria-valuetext", output.textContent);
    map.draw();
  };
  slider.addEventListener("input", () => show(Number(slider.value)));
  const play = el("button", { type: "button", class: "chip", id: "play", disabled: last === 0, onclick: () => run(play, frame, last, show) }, "play");
  return figure("load", "Load by layer and expert", "Tokens of each expert over an even share; the busiest is outlined",
    el("div", { class: "slide" }, el("label", { for: "slider" }, "Time"), slider, output, play), map.canvas, map.readout, ratioScale(),
    folded("load-table", "Numbers", () => busiestTable(found, load)));
}

let timer = null;
function run(button, frame, last, show) {
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "play"; };
  if (timer) return stop();
  if (frame() === last) show(0);
  button.textContent = "stop";
  timer = setInterval(() => {
    if (!button.isConnected || frame() >= last) return stop();
    show(frame() + 1);
  }, Math.max(40, Math.min(250, 8000 / last)));
}

function busiestTable(found, load) {
  const rows = found.layers.map((layer, row) => {
    const all = Array.from({ length: found.experts }, (_, e) => load(row, e) || 0), max = Math.max(...all), min = Math.min(...all);
    return [layer, `${all.indexOf(max)} (${times(max)})`, `${all.indexOf(min)} (${times(min)})`, all.filter(v => v === 0).length];
  });
  return table("Busiest and idlest expert of each layer", ["layer", "busiest expert", "idlest expert", "without a token"], rows);
}

const MEASURES = {
  load_L: ["load of the busiest expert over an even share", v => times(v)], dropped_L: ["share of choices dropped", percent],
  router_entropy_L: ["entropy of the router, nats", short], top1_L: ["probability of the first choice", percent],
  stability_L: ["share of probe tokens that changed experts since the last probe", percent],
  saturation_L: ["share of the last probe's choices that are made again (saturation)", percent],
};

function layerMap(found) {
  const names = Object.keys(MEASURES).filter(name => found.by_layer[name] && found.by_layer[name].flat().some(v => v !== null));
  if (!names.includes(state.measure)) state.measure = names[0];
  const [title, format] = MEASURES[state.measure], data = found.by_layer[state.measure], flat = data.flat().filter(v => v !== null);
  const low = flat.reduce((a, b) => Math.min(a, b)), high = flat.reduce((a, b) => Math.max(a, b));
  const ratio = state.measure === "load_L", amount = state.measure === "dropped_L";
  const colour = ratio ? ratioColour : amount ? amountColour(high) : plainColour(low, high);
  const map = heatMap({
    id: "layers", label: `${title}, by layer and time. Use the arrow keys to read cells, Enter to choose a layer.`,
    rows: found.layers.map(String), columns: found.frames.map(frame => short(frame[1])), rowName: "layer", columnName: "step",
    value: (row, column) => data[row][column], colour, pick: chooseLayer(found), tall: 16, chosen: found.layers.indexOf(state.layer), text: format === percent ? percent : undefined,
    say: (row, column) => `layer ${found.layers[row]}, ${frameName(found.frames[column])}: ${format(data[row][column])}`,
  });
  return figure("layers", "Layers over time", null,
    choice("measure", "Shown", names.map(name => [name, MEASURES[name][0]]), state.measure, value => { state.measure = value; redraw(); }),
    map.canvas, map.readout, ratio ? ratioScale() : rangeScale(amount ? 0 : low, high, colour, format),
    folded("layers-table", "Numbers", () => table(title, ["layer", "first", "last", "least", "greatest"], data.map((row, i) => {
      const known = row.filter(v => v !== null);
      return [found.layers[i], ...(known.length ? [known[0], known[known.length - 1], Math.min(...known), Math.max(...known)] : []).map(format)];
    }))));
}

// Expert bias and gradient norms, as they were last.
function lastTables(found) {
  const shown = [["bias_LE", "Expert bias", "What the router adds to choose, as it was last"], ["grad_norm_LE", "Gradient norm of the experts", "As it was last"]];
  return el("div", { class: "grid" }, shown.filter(([name]) => found[name]).map(([name, title, note]) => {
    const coded = found[name], at = values(coded), colour = name === "bias_LE" ? signedColour(coded.high) : amountColour(coded.high);
    const value = (row, column) => at(row * found.experts + column);
    const map = heatMap({
      id: name, label: `${title} by layer and expert`, rows: found.layers.map(String), columns: indices(found.experts), rowName: "layer", columnName: "expert",
      value, colour, wide: false, say: (row, column) => `layer ${found.layers[row]}, expert ${column}: ${short(value(row, column))}`,
    });
    return figure(`${name}-figure`, title, note, map.canvas, map.readout, rangeScale(coded.low, coded.high, colour, short));
  }));
}

function chooseLayer(found) {
  return row => { state.layer = found.layers[row]; redraw(); };
}
