// Puts the page together, and together again when something is chosen, when the window changes or when the run has gone on.

const state = {
  data: JSON.parse(document.getElementById("data").textContent),
  axis: "step", run: 0, layer: null, frame: null, measure: "load_L", kind: "classes",
  hidden: new Set(), log: new Set(), open: new Set(), cursors: new Map(), redrawing: false, touched: 0, theme: remembered(), message: "live",
};

const chosenRun = () => state.data.runs[Math.min(state.run, state.data.runs.length - 1)];

// Of a chart over the whole page, or of one of two beside each other.
function pageWidth(wide) {
  if (printing) return wide ? 712 : 344;
  const full = Math.min(1160, document.documentElement.clientWidth - (document.documentElement.clientWidth < 600 ? 24 : 48));
  return Math.floor(wide || full < 760 ? full : (full - 24) / 2);
}

function redraw() {
  const active = document.activeElement && document.activeElement.id, page = document.getElementById("page"), y = scrollY;
  lookUpTheme();
  state.redrawing = true;
  const parts = [training, experts, machine, samples, events, others, configuration, parameters, environment].map(part => part()).filter(part => part);
  page.replaceChildren(head(contents(parts)), el("main", {}, parts));
  const again = active && document.getElementById(active);
  if (again) again.focus({ preventScroll: true });
  if (scrollY !== y) scrollTo(0, y);
  state.redrawing = false;
}

function remembered() {
  try { return ["light", "dark"].find(name => name === localStorage.getItem("tokenyard-theme")) || "auto"; } catch { return "auto"; }
}

function applyTheme() {
  document.documentElement.setAttribute("data-theme", state.theme);
  try { localStorage.setItem("tokenyard-theme", state.theme); } catch { /* a page of a file may have no storage */ }
}

// Whether somebody is choosing or sliding, which drawing anew would end.
let late = false;
function busy() {
  const active = document.activeElement;
  return active && (active.matches("input:active") || (active.tagName === "SELECT" && performance.now() - state.touched < 10000));
}
addEventListener("focusin", () => { state.touched = performance.now(); });

// Asks the server of `tokenyard watch` for what is new; the pause is long against what it costs.
async function poll(tag) {
  const begin = performance.now();
  try {
    const answer = await fetch("data", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
    if (answer.status === 200) {
      state.data = await answer.json();
      tag = answer.headers.get("ETag");
      late = true;
    }
    state.message = answer.ok || answer.status === 304 ? "live" : await answer.text();
    if (late && !busy()) {
      late = false;
      redraw();
    }
  } catch {
    state.message = "the server is gone; this is the last that it said";
  }
  const status = document.getElementById("live");
  if (status && status.textContent !== state.message) status.textContent = state.message;
  setTimeout(poll, Math.max(2000, 5 * (performance.now() - begin)), tag);
}

let pending = null, drawnWidth = 0;
addEventListener("resize", () => {
  if (printing || document.documentElement.clientWidth === drawnWidth) return;
  clearTimeout(pending);
  pending = setTimeout(() => { drawnWidth = document.documentElement.clientWidth; redraw(); }, 120);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
matchMedia("print").addEventListener("change", query => { printing = query.matches; redraw(); });

applyTheme();
drawnWidth = document.documentElement.clientWidth;
redraw();
if (state.data.live) poll(null);
