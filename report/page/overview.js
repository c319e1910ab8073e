// The top of the page, and the lines that every run has.

const LEVELS = { good: "\u2713", watch: "!", bad: "\u2715", fact: "\u2022" };
const WORDS = { good: "good", watch: "to watch", bad: "bad", fact: "" };
const STATES = { finished: "finished", failed: "failed", stopped: "stopped", "no end recorded": "going on, or ended without a word" };

function head(contents) {
  const { runs, live } = state.data;
  const themes = el("button", {
    type: "button", class: "chip", id: "theme", "aria-label": `Colours: ${state.theme}; press for the next`,
    onclick: () => {
      state.theme = { auto: "light", light: "dark", dark: "auto" }[state.theme];
      applyTheme();
      redraw();
    },
  }, `colours: ${state.theme}`);
  return el("header", {},
    el("div", { class: "top" },
      el("h1", {}, runs.length > MANY ? `${runs.length} runs` : runs.map(run => run.name).join(", ")),
      el("span", { class: "status", id: "live", role: "status" }, live ? state.message : ""), themes),
    contents, comparison(),
    runs.length > MANY ? folded("openings", "Each run: balance, losses, memory, failures", () => el("div", {}, runs.map(opening))) : runs.map(opening));
}

function opening(run, index) {
  const progress = run.planned && run.planned >= run.steps ? `${whole(run.steps)} of ${whole(run.planned)} steps` : `${whole(run.steps)} steps`;
  const swatches = state.data.runs.length > 1 ? swatch(runColour(index), runDash(index)) : null;
  return el("div", { class: "opening" },
    state.data.runs.length > 1 ? el("h2", {}, swatches, run.name) : null,
    el("p", { class: "folder" }, `${run.folder}: ${STATES[run.state]}; ${progress}, ${short(run.tokens)} tokens`),
    el("ul", { class: "verdict" }, run.verdict.map(({ level, text }) =>
      el("li", { class: level }, el("span", { class: "sign", "aria-hidden": "true" }, LEVELS[level]),
        WORDS[level] ? el("span", { class: "hidden" }, `${WORDS[level]}: `) : null, text))),
    run.remarks.map(text => el("p", { class: "remark" }, text)),
    el("div", { class: "glance" }, balanceBars(run), tiles(run)));
}

function tiles(run) {
  const { facts, parameters } = run;
  const shown = [
    ["loss", facts.loss, short], ["validation loss", facts.validation_loss, short],
    ["tokens per second", facts.tokens_per_second, short], ["MFU", facts.mfu, percent], ["step", facts.step_seconds, seconds],
    ["bits per byte", facts.bits_per_byte, short], ["memory", facts.memory_gb, gigabytes], ["of the device", facts.memory_share, percent],
    ["parameters", parameters && parameters.total, short], ["active", parameters && parameters.active, short],
  ].filter(([, value]) => value !== null && value !== undefined);
  return el("dl", { class: "tiles" }, shown.map(([name, value, format]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, format(value)))));
}

// The lines of a metric, one for each run that has it.
function series(name, kind = name, more = {}) {
  return state.data.runs.flatMap((run, index) => run.series[name] && (state.axis === "step" || run.axes[state.axis])
    ? [{ run: index, kind, name: state.data.runs.length > 1 ? `${run.name} ${kind}` : kind, ...onAxis(run, run.series[name]), ...more }] : []);
}

function chart(spec) {
  return spec.series.length ? lineChart({ events: chosenRun().events, ...spec }) : null;
}

function training() {
  return section("training", "Training", axisChoice(),
    el("p", { class: "key" }, "Above the lines: ", key("checkpoint", "checkpoint"), key("restart", "restart"), key("trouble", "failure or alert")),
    chart({
      id: "loss", title: "Loss", note: "Mean cross entropy per token, in nats; thin as logged, thick smoothed", wide: true, height: 320, canLog: true,
      series: [...series("loss", "training"), ...validation()],
    }),
    el("div", { class: "grid" },
      chart({ id: "bits", title: "Bits per byte", note: "Of validation; comparable between tokenizers", series: series("validation/bits_per_byte", "validation", { dots: true, sx: undefined, sy: undefined }) }),
      chart({ id: "lr", title: "Learning rate", series: series("lr", "learning rate"), zero: true }),
      chart({ id: "grad_norm", title: "Gradient norm", note: "Before clipping", series: series("grad_norm", "gradient norm"), canLog: true, zero: true }),
      chart({ id: "speed", title: "Tokens per second", series: series("tokens_per_second", "tokens per second"), zero: true }),
      chart({ id: "mfu", title: "MFU", note: "Model FLOPs over the peak of the devices", series: series("mfu", "MFU"), format: percent, zero: true })),
    timeBars());
}

function key(kind, text) {
  const shape = { checkpoint: "M2 2h8l-4 7z", restart: "M1 10h10l-5 -9z", trouble: "M2 2l8 8m0 -8l-8 8" }[kind];
  return el("span", { class: "keyed" }, svg("svg", { viewBox: "0 0 12 12", "aria-hidden": "true" }, svg("g", { class: `mark ${kind}` }, svg("path", { d: shape }))), text);
}

function validation() {
  return series("validation_loss", "validation", { dots: true, sx: undefined, sy: undefined });
}

const DRAWN = ["loss", "validation_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "dropped_fraction", "tokens",
  "moe/load_max_over_mean", "moe/load_max_over_mean_mean",
  "moe/router_entropy", "moe/router_entropy_mean", "moe/dead_fraction", "validation/bits_per_byte", "data_wait_fraction", "perf/exchange_fraction",
  "perf/host_wait_fraction", "system/memory_peak_gb", "system/memory_peak_gb_mean", "system/memory_share", "system/memory_reserved_gb",
  "system/memory_allocated_gb", "system/memory_resident_gb"];

// Whatever else was logged, so that nothing is left out.
function others() {
  const names = [...new Set(state.data.runs.flatMap(run => Object.keys(run.series)))].filter(name => !DRAWN.includes(name)).sort();
  if (!names.length) return null;
  return section("others", "All other metrics", folded("others-all", `${names.length} more, as they are called in metrics.jsonl`, () =>
    el("div", { class: "grid" }, names.map((name, i) => chart({ id: `other-${i}`, title: name, series: series(name) })))));
}
