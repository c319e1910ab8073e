// The horizontal axis of lines: steps, or what was trained on until then. Values lie on the straight line between those that are known.

const AXES = {
  step: ["steps", x => `step ${whole(x)}`], tokens: ["tokens", x => `${short(x)} tokens`],
  flops: ["FLOPs", x => `${amount(x)}FLOP`], hours: ["hours of training", x => `${trimmed(x, 4)} h`],
};
const axisName = () => AXES[state.axis][0];
const axisText = x => AXES[state.axis][1](x);
const axisTick = x => state.axis === "step" ? short(x) : state.axis === "hours" ? trimmed(x, 3) : amount(x);

// FLOPs and tokens beyond what `short` has letters for: 1.2e21 is 1.2 Z.
function amount(value) {
  for (const [unit, letter] of [[1e21, "Z"], [1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= unit) return `${trimmed(value / unit, 3)} ${letter}`;
  return `${trimmed(value, 3)} `;
}

// Where a step of the run lies; null where that is unknown.
function placeOf(run, step) {
  if (state.axis === "step") return step;
  const axis = run.axes[state.axis];
  if (!axis || !axis.x.length) return null;
  const { x, y } = axis;
  if (step <= x[0]) return y[0] * step / x[0];
  let low = 0, high = x.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] <= step) low = middle; else high = middle;
  }
  if (high === low) return y[low];
  const beyond = Math.min(1, (step - x[low]) / (x[high] - x[low]));
  return y[low] + beyond * (y[high] - y[low]);
}

function onAxis(run, line) {
  if (state.axis === "step") return line;
  const moved = steps => steps && steps.map(step => placeOf(run, step));
  return { ...line, x: moved(line.x), sx: moved(line.sx), bad: moved(line.bad) };
}

function axisChoice() {
  const known = Object.keys(AXES).filter(name => name === "step" || state.data.runs.some(run => run.axes[name]));
  return known.length < 2 ? null : choice("axis", "Horizontal axis", known.map(name => [name, AXES[name][0]]), state.axis,
    value => { state.axis = value; state.cursors.clear(); redraw(); });
}
