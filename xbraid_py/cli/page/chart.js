// Curves as SVG: axes with round numbers, a legend beside them, and a cursor for the mouse and the arrow keys.

const HEIGHT = 260, LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 34;
const DASHES = ["", "6 4", "2 4", "9 3 2 3"];

export function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

export function html(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function shown(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return Number(value.toPrecision(3)).toExponential().replace("e-", "e−").replace("e+", "e");
  return String(Number(value.toPrecision(5)));
}

// Between 3 and 7 round numbers that lie in an interval.
function ticks(low, high) {
  const span = high - low || Math.abs(high) || 1;
  const raw = span / 5, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => span / each <= 6);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step / 1e6 ? 0 : at);
  return found;
}

// Powers of ten, or 1, 2 and 5 times them where there are few.
function logTicks(low, high) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const factors = last - first <= 3 ? [1, 2, 5] : [1], every = Math.max(1, Math.ceil((last - first) / 6));
  const found = [];
  for (let power = first; power <= last; power += every)
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  return found.length >= 2 ? found : ticks(low, high).filter((each) => each > 0);
}

function usesLog(values) {
  const positive = values.filter((value) => value > 0);
  return positive.length > 0 && Math.min(...values) >= 0 && Math.max(...positive) > 20 * Math.min(...positive);
}

// curves: [{label, color, dash, dots, points: [[x, y], ...]}]; marks: [[x, text], ...]
export function chart(title, curves, { xlabel, percent = false, marks = [] }) {
  const WIDTH = Math.max(280, Math.min(520, document.documentElement.clientWidth - 62)); // letters stay as large as they are
  const drawn = curves.filter((curve) => curve.points.length > 0);
  const scale = percent ? 100 : 1;
  let values = drawn.flatMap((curve) => curve.points.map(([, y]) => y * scale));
  const log = !percent && usesLog(values);
  if (log) values = values.filter((value) => value > 0);
  const xs = drawn.flatMap((curve) => curve.points.map(([x]) => x));
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 20, high + (Math.abs(high) || 1) / 20];
  const f = log ? Math.log10 : (value) => value;
  const toX = (x) => LEFT + ((x - left) / (right - left || 1)) * (WIDTH - LEFT - RIGHT);
  const toY = (y) => HEIGHT - BOTTOM - ((f(y) - f(low)) / (f(high) - f(low) || 1)) * (HEIGHT - TOP - BOTTOM);
  const first = drawn.map((curve) => {
    const [start, end] = [curve.points[0][1] * scale, curve.points.at(-1)[1] * scale];
    return `${curve.label}: from ${shown(start)} to ${shown(end)}${percent ? " percent" : ""}`;
  });
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0",
    "aria-label": `${title} over ${xlabel}. ${first.join(". ")}. The arrow keys move a cursor.` });
  for (const value of (log ? logTicks : ticks)(low, high)) {
    const y = toY(value);
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }),
      svg("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" }, shown(value)));
  }
  for (const value of ticks(left, right)) {
    const x = toX(value);
    picture.append(svg("line", { class: "axis", x1: x, x2: x, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 4 }),
      svg("text", { x, y: HEIGHT - BOTTOM + 17, "text-anchor": "middle" }, shown(value)));
  }
  picture.append(svg("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }),
    svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 2, "text-anchor": "end" }, xlabel));
  for (const [x, text] of marks)
    picture.append(svg("line", { class: "mark", x1: toX(x), x2: toX(x), y1: TOP, y2: HEIGHT - BOTTOM }),
      svg("text", { class: "label", x: toX(x) + 5, y: TOP + 9 }, text));
  for (const curve of drawn) {
    const points = curve.points.filter(([, y]) => !log || y > 0);
    const path = points.map(([x, y], at) => `${at ? "L" : "M"}${toX(x).toFixed(1)} ${toY(y * scale).toFixed(1)}`).join("");
    picture.append(svg("path", { class: `s${curve.color % 8}`, d: path, "stroke-dasharray": DASHES[curve.dash % 4] }));
    if (points.length <= 12)
      for (const [x, y] of points) picture.append(svg("circle", { class: `f${curve.color % 8}`, cx: toX(x), cy: toY(y * scale), r: 3 }));
  }
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  picture.append(cursor);
  const readings = drawn.map(() => html("b"));
  const unit = percent ? " %" : "";
  const legend = html("ul", { class: "legend" }, ...drawn.map((curve, at) => html("li", {},
    svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" },
      svg("path", { class: `s${curve.color % 8}`, d: "M1 5H25", "stroke-dasharray": DASHES[curve.dash % 4] })),
    html("span", {}, curve.label), readings[at])));
  const where = html("span", { class: "quiet" });
  const read = (x) => {
    cursor.setAttribute("visibility", x === null ? "hidden" : "visible");
    if (x !== null) { cursor.setAttribute("x1", toX(x)); cursor.setAttribute("x2", toX(x)); }
    where.textContent = x === null ? "" : ` at ${shown(x)} ${xlabel}`;
    drawn.forEach((curve, at) => {
      const point = x === null ? curve.points.at(-1) : curve.points.findLast(([each]) => each <= x) ?? curve.points[0];
      readings[at].textContent = shown(point[1] * scale) + unit;
    });
  };
  const places = [...new Set(xs)].sort((a, b) => a - b);
  let index = null;
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const x = left + (((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT)) * (right - left);
    index = places.findLastIndex((each) => each <= x);
    read(places[Math.max(0, index)]);
  });
  picture.addEventListener("pointerleave", () => { index = null; read(null); });
  picture.addEventListener("blur", () => { index = null; read(null); });
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    index = Math.min(places.length - 1, Math.max(0, (index ?? places.length - 1) + step));
    read(places[index]);
  });
  read(null);
  return html("figure", { class: "chart card" }, html("figcaption", {}, title + (log ? ", logarithmic" : ""), where), picture, legend);
}
