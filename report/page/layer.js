// One layer: what its experts specialise in, which are chosen together, which tokens they see.

function layerPart(found) {
  const parts = [specialisation(found), pairs(found), vocabulary(found)].filter(part => part);
  if (!parts.length) return null;
  return el("div", { class: "onelayer" },
    el("div", { class: "sticky" },
      choice("layer", "Layer", found.layers.map(layer => [layer, layer]), state.layer, value => { state.layer = Number(value); redraw(); })),
    parts);
}

const KINDS = { classes: "class of token", sources: "source of the data" };

function specialisation(found) {
  const kinds = Object.keys(found.kinds);
  if (!kinds.length) return null;
  if (!kinds.includes(state.kind)) state.kind = kinds[0];
  const { names, counts } = found.kinds[state.kind], rows = counts[found.layers.indexOf(state.layer)];
  const total = rows.flat().reduce((a, b) => a + b, 0) || 1, sum = row => row.reduce((a, b) => a + b, 0);
  const usual = names.map((_, k) => rows.reduce((a, row) => a + row[k], 0) / total);
  // How much more of an expert's tokens are of this kind than of all tokens of the layer.
  const lift = (kind, expert) => sum(rows[expert]) ? usual[kind] ? rows[expert][kind] / sum(rows[expert]) / usual[kind] : null : 0;
  const map = heatMap({
    id: "kinds", label: `Layer ${state.layer}: experts by ${KINDS[state.kind]}, over what the layer gets`,
    rows: names.map(name => name.slice(0, 12)), columns: indices(rows.length), rowName: "", columnName: "expert", value: lift, colour: ratioColour, gutter: 84,
    say: (kind, expert) => `expert ${expert}, ${names[kind]}: ${percent(rows[expert][kind] / (sum(rows[expert]) || 1))} of its tokens, ${percent(usual[kind])} of the layer's`,
  });
  return figure("specialisation", `Specialisation in layer ${state.layer}`, `Share of each ${KINDS[state.kind]} in an expert's tokens, over its share in all tokens of the layer`,
    kinds.length > 1 ? choice("kind", "By", kinds.map(kind => [kind, KINDS[kind]]), state.kind, value => { state.kind = value; redraw(); }) : null,
    map.canvas, map.readout, ratioScale(),
    folded("specialisation-table", "Numbers", () => table(`Share of an expert's tokens by ${KINDS[state.kind]}`, ["expert", ...names],
      rows.map((row, expert) => [expert, ...row.map(n => percent(n / (sum(row) || 1)))]))));
}

const PAIRS = { coactivation: "Chosen together", similarity: "Similarity of weights" };

function pairs(found) {
  const shown = Object.keys(PAIRS).filter(name => found[name][state.layer]);
  const known = Object.keys(found.coactivation);
  if (!shown.length && known.length) return el("p", { class: "note" }, `Which experts are chosen together, and their tokens, is recorded for layers ${known.join(", ")}.`);
  return shown.length ? el("div", { class: "grid" }, shown.map(name => pairMap(found, name))) : null;
}

function pairMap(found, name) {
  const coded = found[name][state.layer], at = values(coded), E = coded.shape[0], together = name === "coactivation";
  const value = (row, column) => row === column ? null : at(row * E + column), colour = together ? ratioColour : signedColour(1);
  const text = v => v === null ? "itself" : together ? `${v ? times(v) : "never"}${v ? " what an even choice would give" : ""}` : `cosine ${short(v)}`;
  const map = heatMap({
    id: name, label: `${PAIRS[name]} in layer ${state.layer}, expert by expert`, rows: indices(E), columns: indices(E), rowName: "expert", columnName: "expert",
    value, colour, wide: false, tall: 16, say: (row, column) => `experts ${row} and ${column}: ${text(value(row, column))}`,
  });
  const note = together ? "How often the others are chosen with an expert, over what an even choice would give" : "Cosine of the experts' weights";
  return figure(`${name}-figure`, `${PAIRS[name]} in layer ${state.layer}`, note, map.canvas, map.readout,
    together ? ratioScale("never") : rangeScale(-1, 1, colour, short));
}

function vocabulary(found) {
  const rows = found.vocabulary[state.layer];
  if (!rows) return null;
  const token = ([text, count]) => el("span", { class: "token", title: `${whole(count)} times` }, visible(text));
  return figure("vocabulary", `Most frequent tokens in layer ${state.layer}`, "Of each expert, the most frequent first",
    table(`Tokens of layer ${state.layer}`, ["expert", "tokens"], rows.map((tokens, expert) => [expert, el("span", {}, tokens.map(token))]), false));
}

// Blanks and line ends as signs.
function visible(text) {
  return String(text).replaceAll(" ", "\u00b7").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5") || "(empty)";
}
