// Colours that people with any kind of colour vision tell apart, for both themes. More away from even is more away from the paper.

const RUNS = {
  light: ["#0064a6", "#c04a00", "#00745a", "#a03f84", "#7a5c00", "#4b4b9a"],
  dark: ["#5cb3ff", "#ff9a52", "#3dd6a3", "#f09bd1", "#e3c04a", "#b9b6ff"],
};
const DASHES = [null, "7 3", "2 3", "10 3 2 3"];
const BELOW_AND_ABOVE = {
  light: [["#eeeeee", "#b5d4e9", "#5ba3cf", "#2070b4", "#083877"], ["#eeeeee", "#fdc692", "#f4822f", "#c84a02", "#6b2303"]],
  dark: [["#2b2f36", "#1f4a6b", "#3182bd", "#74b3dd", "#c6e2f5"], ["#2b2f36", "#6e3d12", "#c9651b", "#f79a4b", "#ffdcb3"]],
};
const LOW_TO_HIGH = { light: ["#083877", "#2070b4", "#8a8a8a", "#c84a02", "#6b2303"], dark: ["#c6e2f5", "#74b3dd", "#9aa0a8", "#f79a4b", "#ffdcb3"] };
const PLAIN = ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725"];
const EXTREME = 3;  // doublings at which the colour of a ratio is at its end

let printing = false, shade = "light";

// Asked for each cell of a heat map, so it is looked up once for each drawing of the page.
const theme = () => shade;

function lookUpTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  shade = printing ? "light" : state.theme !== "auto" ? state.theme : dark ? "dark" : "light";
}

const runColour = index => RUNS[theme()][index % RUNS.light.length];
const runDash = index => DASHES[Math.floor(index / RUNS.light.length) % DASHES.length];
const ink = () => theme() === "dark" ? "#f2f2f2" : "#111111";
const paper = () => theme() === "dark" ? "#15181c" : "#ffffff";

// A multiple of an even share: 1 is grey, less is blue, more is orange, none at all is ink.
function ratioColour(value) {
  if (value === null) return rgb(paper());
  if (value === 0) return rgb(ink());
  const place = Math.max(-1, Math.min(1, Math.log2(value) / EXTREME));
  return along(BELOW_AND_ABOVE[theme()][place < 0 ? 0 : 1], Math.abs(place));
}

// A signed number between -widest and widest.
function signedColour(widest) {
  return value => value === null ? rgb(paper()) : along(BELOW_AND_ABOVE[theme()][value < 0 ? 0 : 1], Math.abs(value) / (widest || 1));
}

function amountColour(high) {
  return value => value === null ? rgb(paper()) : along(BELOW_AND_ABOVE[theme()][1], value / (high || 1));
}

function plainColour(low, high) {
  return value => value === null ? rgb(paper()) : along(PLAIN, (value - low) / (high - low || 1));
}

// Of a rank among `count`, where 0 is the lowest.
const rankColour = (rank, count) => along(LOW_TO_HIGH[theme()], rank / Math.max(1, count - 1));

function along(stops, place) {
  const at = Math.max(0, Math.min(1, place)) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(at));
  const a = rgb(stops[i]), b = rgb(stops[i + 1]), t = at - i;
  return [Math.round(a[0] + t * (b[0] - a[0])), Math.round(a[1] + t * (b[1] - a[1])), Math.round(a[2] + t * (b[2] - a[2]))];
}

// Black or white, whichever has the greater contrast (WCAG 2.1).
function readableOn(colour) {
  const [red, green, blue] = colour.map(part => part / 255).map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000000" : "#ffffff";
}

const known = new Map();
function rgb(hex) {
  if (!known.has(hex)) known.set(hex, [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16)));
  return known.get(hex);
}
