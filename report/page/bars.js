// Where the time went: one bar for each run, cut into its parts.

const PARTS = ["compute", "data", "evaluation", "checkpoint", "startup", "lost"];
const PART_COLOURS = {
  light: ["#0064a6", "#7fb8e6", "#00745a", "#8a6500", "#9a9a9a", "#b3261e"],
  dark: ["#5cb3ff", "#2f6594", "#3dd6a3", "#e3c04a", "#8b9098", "#ff7a70"],
};

function timeBars() {
  const runs = state.data.runs.filter(run => run.accounting);
  if (!runs.length) return null;
  const names = [...new Set([...PARTS, ...runs.flatMap(run => Object.keys(run.accounting.seconds))])]
    .filter(name => runs.some(run => run.accounting.seconds[name]));
  const colour = name => PART_COLOURS[theme()][(PARTS.indexOf(name) + 6) % 6];
  const bar = run => {
    const parts = run.accounting.seconds, total = Object.values(parts).reduce((a, b) => a + b, 0) || 1;
    const bar = el("div", { class: "bar", role: "img", "aria-label": names.map(name => `${name} ${percent((parts[name] || 0) / total)}`).join(", ") });
    for (const name of names) {
      const part = el("span", { title: `${name}: ${seconds(parts[name] || 0)}` });
      part.style.width = `${100 * (parts[name] || 0) / total}%`;
      part.style.backgroundColor = colour(name);
      bar.append(part);
    }
    return bar;
  };
  const rows = runs.flatMap(run => [runs.length > 1 ? el("p", { class: "barname" }, run.name) : null, bar(run)]);
  const sum = run => Object.values(run.accounting.seconds).reduce((a, b) => a + b, 0);
  return figure("time", "Where the time went", productive(runs), rows,
    colourScale(names.map(name => [name, rgb(colour(name))])),
    table("Where the time went", ["", ...runs.map(run => run.name)],
      [...names, "all"].map(name => [name, ...runs.map(run => {
        const value = name === "all" ? sum(run) : run.accounting.seconds[name] || 0;
        return `${seconds(value)} (${percent(value / (sum(run) || 1))})`;
      })])));
}

function productive(runs) {
  return runs.filter(run => typeof run.accounting.productive === "number")
    .map(run => `${runs.length > 1 ? `${run.name}: ` : ""}${percent(run.accounting.productive)} of the time trained the model`).join("; ");
}
