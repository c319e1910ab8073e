// A heat map on a canvas: a cell for each row and column, a cursor for the pointer and the arrow keys, a line that says what is there.

const FOOT = 30;

// value(row, column) -> number or null; colour(value) -> [r, g, b]; say(row, column) -> text; text(value): in a cell with room for it. `draw` shows new values in the same place.
function heatMap({ id, label, rows, columns, rowName, columnName, value, colour, say, wide = true, tall = 22, pick = null, mark = null, text = v => trimmed(v, 2), chosen = null, gutter = 46 }) {
  const width = pageWidth(wide), cell = Math.max(5, Math.min(tall, Math.floor((wide ? 440 : 380) / rows.length)));
  const height = cell * rows.length + FOOT, inner = width - gutter - 4;
  const canvas = el("canvas", { id: `${id}-canvas`, class: "heat", tabindex: 0, role: "img", "aria-label": label, "aria-describedby": `${id}-readout` });
  const readout = el("p", { class: "readout", id: `${id}-readout`, "aria-live": "polite" });
  const sharp = Math.max(2, devicePixelRatio || 1);
  canvas.width = width * sharp;
  canvas.height = height * sharp;
  let at = state.cursors.get(id) || null;
  if (at && (at[0] >= rows.length || at[1] >= columns.length)) at = null;

  function draw() {
    const context = canvas.getContext("2d"), small = document.createElement("canvas");
    small.width = columns.length;
    small.height = rows.length;
    small.getContext("2d").putImageData(pixels(), 0, 0);
    context.setTransform(sharp, 0, 0, sharp, 0, 0);
    context.clearRect(0, 0, width, height);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, gutter, 0, inner, cell * rows.length);
    labels(context);
    if (cell >= 15) numbers(context);
    const special = mark ? mark() : null;
    if (special) outline(context, special, ink());
    if (at) outline(context, at, ink(), true);
    readout.textContent = at ? say(...at) : special ? say(...special) : "";
  }

  function pixels() {
    const image = new ImageData(columns.length, rows.length);
    for (let row = 0, i = 0; row < rows.length; row++)
      for (let column = 0; column < columns.length; column++, i += 4) {
        const shown = colour(value(row, column));
        for (let channel = 0; channel < 3; channel++) image.data[i + channel] = shown[channel];
        image.data[i + 3] = 255;
      }
    return image;
  }

  // Only if all of them fit.
  function numbers(context) {
    const cells = rows.flatMap((_, row) => columns.map((_, column) => [row, column, value(row, column)])).filter(([, , v]) => v !== null);
    const size = inner / columns.length;
    if (size < 22 || cells.some(([, , v]) => context.measureText(text(v)).width > size - 6)) return;
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (const [row, column, v] of cells) {
      context.fillStyle = readableOn(colour(v));
      context.fillText(text(v), gutter + (column + 0.5) * size, (row + 0.5) * cell + 1);
    }
  }

  function labels(context) {
    context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    context.fillStyle = theme() === "dark" ? "#b4bac2" : "#4c535b";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const everyRow = Math.ceil(13 / cell);
    rows.forEach((name, row) => { if (row % everyRow === 0) context.fillText(name, gutter - 6, (row + 0.5) * cell); });
    context.textBaseline = "top";
    context.textAlign = "center";
    const size = inner / columns.length, longest = Math.max(...columns.map(name => context.measureText(name).width));
    const everyColumn = Math.max(1, Math.ceil((longest + 12) / size));
    columns.forEach((name, column) => {
      if (column % everyColumn === 0) context.fillText(name, Math.min(gutter + (column + 0.5) * size, width - 1 - context.measureText(name).width / 2), rows.length * cell + 4);
    });
    context.textAlign = "left";
    context.fillText(rowName, 0, rows.length * cell + 16);
    context.textAlign = "right";
    context.fillText(columnName, width - 4, rows.length * cell + 17);
    if (chosen !== null && chosen >= 0) context.fillRect(gutter - 4, chosen * cell, 3, cell);
  }

  function outline(context, [row, column], colour, double) {
    const size = inner / columns.length, grow = Math.max(0, (7 - size) / 2);
    const box = [gutter + column * size - grow, row * cell, size + 2 * grow, cell];
    context.lineWidth = double ? 4 : 2;
    context.strokeStyle = colour;
    context.strokeRect(...box);
    if (double) {
      context.lineWidth = 2;
      context.strokeStyle = paper();
      context.strokeRect(...box);
    }
  }

  function go(row, column) {
    at = [Math.max(0, Math.min(rows.length - 1, row)), Math.max(0, Math.min(columns.length - 1, column))];
    state.cursors.set(id, at);
    draw();
  }
  function leave() {
    if (state.redrawing) return;
    at = null;
    state.cursors.delete(id);
    draw();
  }
  const under = event => {
    const box = canvas.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * width, y = (event.clientY - box.top) / box.height * height;
    return [Math.floor(y / cell), Math.floor((x - gutter) / inner * columns.length)];
  };
  canvas.addEventListener("pointermove", event => {
    const [row, column] = under(event);
    if (row < rows.length && column >= 0 && !(at && at[0] === row && at[1] === column)) go(row, column);
  });
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("blur", leave);
  canvas.addEventListener("click", event => { if (pick && under(event)[0] < rows.length) pick(under(event)[0]); });
  canvas.addEventListener("keydown", event => {
    const [row, column] = at || [0, 0], stride = event.shiftKey ? 10 : 1;
    const to = { ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - stride], ArrowRight: [row, column + stride], Home: [row, 0], End: [row, columns.length - 1] }[event.key];
    if (event.key === "Enter" && pick) pick(row);
    if (!to) return;
    event.preventDefault();
    go(...(at ? to : [row, column]));
  });
  draw();
  return { canvas, readout, draw };
}

// The scale of colours, with numbers at some places: stops is [[text, [r, g, b]], ...].
function colourScale(stops, none = null) {
  const item = ([text, colour]) => {
    const box = el("span", { class: "colour" });
    box.style.backgroundColor = `rgb(${colour})`;
    return el("span", { class: "stop" }, box, text);
  };
  return el("p", { class: "scale", "aria-label": "Colours" }, stops.map(item), none ? item([none, rgb(ink())]) : null);
}

const ratioScale = (none = "no token") => colourScale([[0.125, "1/8"], [0.25, "1/4"], [0.5, "1/2"], [1, "1 x (even)"], [2, "2 x"], [4, "4 x"], [8, "8 x or more"]]
  .map(([value, text]) => [text, ratioColour(value)]), none);

function rangeScale(low, high, colour, format) {
  return colourScale([0, 0.25, 0.5, 0.75, 1].map(part => low + part * (high - low)).map(value => [format(value), colour(value)]));
}
