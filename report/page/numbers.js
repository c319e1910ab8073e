// Numbers as people write them.

function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "-";
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]])
    if (size >= unit) return `${trimmed(value / (letter === "k" ? 1e3 : unit), 3)}${letter}`;
  if (size !== 0 && size < 1e-4) return value.toExponential(2);
  return trimmed(value, 4);
}

function trimmed(value, digits) {
  return String(Number(value.toPrecision(digits)));
}

const percent = value => value === null || value === undefined ? "-" : `${trimmed(100 * value, 3)}%`;
const times = value => value === null ? "nothing routed" : value === 0 ? "no token" : `${trimmed(value, 2)} x`;
const whole = value => value === null || value === undefined ? "-" : Math.round(value).toLocaleString("en-US");

function seconds(value) {
  if (value < 1) return `${trimmed(value * 1000, 3)} ms`;
  if (value < 100) return `${trimmed(value, 3)} s`;
  const minutes = Math.floor(value / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(value % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// About `count` round numbers from low to high.
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough) || power;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
  return found;
}

// Powers of ten, with 2 and 5 between them where there are few.
function logTicks(low, high) {
  const found = [], few = Math.log10(high / low) < 2;
  for (let e = Math.floor(Math.log10(low)); 10 ** e <= high; e++)
    for (const m of few ? [1, 2, 5] : [1]) if (m * 10 ** e >= low && m * 10 ** e <= high) found.push(m * 10 ** e);
  return found;
}

function bytesOf(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

// A coded table (report/payload.py) as a function from a place to a number; 0 stays 0, what is not known is null.
function decoder(coded) {
  const bytes = bytesOf(coded.codes);
  return place => {
    const code = bytes[place];
    if (code === 255) return null;
    if (code === 0) return 0;
    const value = coded.low + (code - 1) / 253 * (coded.high - coded.low);
    return coded.log ? 2 ** value : value;
  };
}
