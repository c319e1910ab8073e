// The layers beside each other on top of the page: how much the busiest expert of each gets, the least balanced in colour.

const TALL = 132, FLOOR = 30, HEAD = 20;

function balanceBars(run) {
  const found = run.telemetry;
  if (!found) return null;
  const most = found.balance.map(([, load]) => load), worst = most.indexOf(Math.max(...most)), layers = found.layers;
  const left = 40, full = pageWidth(true), pitch = Math.min(64, (full - left) / layers.length), width = left + pitch * layers.length;
  const high = Math.max(...most, 1.2), y = load => TALL - FLOOR - load / high * (TALL - FLOOR - HEAD);
  const bar = Math.max(1, pitch - Math.min(10, Math.max(1, pitch / 5))), all = pitch >= 34;
  const label = i => pitch >= 26 || i === worst || i % Math.ceil(26 / pitch) === 0 && Math.abs(i - worst) * pitch > 26;
  const words = i => `layer ${layers[i]}: expert ${found.balance[i][0]} gets ${most[i].toFixed(2)} x an even share`;
  const middle = i => left + (i + 0.5) * pitch;
  return figure(`glance-${state.data.runs.indexOf(run)}`, "Balance of the layers",
    `What the busiest expert of each layer gets, over an even share, in ${frameName(found.recent || found.frames[0])}`,
    svg("svg", { viewBox: `0 0 ${width} ${TALL}`, width, class: "bars", role: "img", "aria-label": `${most.length} layers; the least balanced is ${words(worst)}` },
      most.map((load, i) => svg("g", { class: i === worst ? `worst ${run.verdict[0].level}` : "" },
        svg("rect", { x: middle(i) - bar / 2, width: bar, y: y(load), height: y(0) - y(load) }), svg("title", {}, words(i)),
        all || i === worst ? svg("text", { class: "tick", x: Math.max(left + 12, Math.min(width - 12, middle(i))), y: y(load) - 5, "text-anchor": "middle" }, load.toFixed(2)) : null,
        label(i) ? svg("text", { class: "tick", x: middle(i), y: TALL - FLOOR + 14, "text-anchor": "middle" }, layers[i]) : null)),
      svg("line", { class: "even", x1: left, x2: width, y1: y(1), y2: y(1) }),
      svg("text", { class: "tick", x: left - 6, y: y(1) + 4, "text-anchor": "end" }, "even"),
      svg("text", { class: "tick", x: left - 6, y: TALL - FLOOR + 14, "text-anchor": "end" }, "layer")));
}
