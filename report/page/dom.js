// Elements. What is shown is always a text node: nothing from a file is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

// el("button", {class: "chip", onclick: f}, "text", child): attributes that are null or false are left out.
function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(3)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

// rows of cells; the first cell of each row is its heading.
function table(caption, head, rows, numeric = true) {
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    el("table", { class: numeric ? "numbers" : "" },
      el("caption", { class: "hidden" }, caption),
      el("thead", {}, el("tr", {}, head.map(cell => el("th", { scope: "col" }, cell)))),
      el("tbody", {}, rows.map(([first, ...others]) =>
        el("tr", {}, el("th", { scope: "row" }, first), others.map(cell => el("td", {}, cell)))))));
}

// A folded part. What is in it is made when it is opened first; `state.open` remembers it over redrawing.
function folded(id, title, content) {
  const details = el("details", { id, open: state.open.has(id) }, el("summary", {}, title));
  const fill = () => { if (details.open && details.childElementCount === 1) details.append(content()); };
  details.addEventListener("toggle", () => {
    if (details.open) state.open.add(id); else state.open.delete(id);
    fill();
  });
  fill();
  return details;
}

function choice(id, label, options, chosen, onchange) {
  return el("label", { class: "choice", for: id }, label,
    el("select", { id, onchange: event => onchange(event.target.value) },
      options.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen) }, text))));
}

// A chart with its title, what stands above it, a line that is read out, and its numbers as a table.
function figure(id, title, note, ...content) {
  return el("figure", { id, class: "chart", "aria-label": title },
    el("figcaption", {}, el("h3", {}, title), note ? el("p", { class: "note" }, note) : null), ...content);
}

function section(id, title, ...content) {
  return el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), ...content);
}
