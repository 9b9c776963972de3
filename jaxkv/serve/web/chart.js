// A line chart of the last two minutes: axes with units, a legend, a gap where there is nothing to show.

import { h, legend, number, svg } from "./dom.js";

const HEIGHT = 150; // pixels; as wide as there is room
const [LEFT, RIGHT, TOP, BOTTOM] = [42, 8, 10, 22];
const SPAN_S = 120;

// The smallest of 1, 2, 5 times a power of ten that is at least value.
function round(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value * 0.9999);
}

export class Chart {
  // lines: [[class, text], ...]; ceiling: fixed top of the axis, else it follows the data.
  constructor(title, unit, lines, ceiling = null) {
    this.lines = lines;
    this.ceiling = ceiling;
    this.unit = unit;
    this.points = []; // [seconds, value of each line]
    this.plot = svg("svg", { height: HEIGHT, role: "img" });
    this.element = h("figure", { class: "card" },
      h("figcaption", {}, h("h2", {}, title), h("span", { class: "dim" }, unit), legend(lines)), this.plot);
    this.title = title;
  }

  add(time, ...values) {
    this.points.push([time, ...values]);
    while (this.points[0][0] < time - SPAN_S) this.points.shift();
    this.#draw(time);
  }

  #draw(now) {
    const values = this.points.flatMap((point) => point.slice(1)).filter(Number.isFinite);
    const top = this.ceiling ?? round(Math.max(1, ...values));
    const width = this.plot.clientWidth;
    const x = (time) => LEFT + (width - LEFT - RIGHT) * (1 - (now - time) / SPAN_S);
    const y = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top;
    const grid = [0, 0.5, 1].map((share) => svg("g", {},
      svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(share * top), y2: y(share * top) }),
      svg("text", { x: LEFT - 5, y: y(share * top) + 4, "text-anchor": "end" }, number(share * top))));
    const ticks = [SPAN_S, SPAN_S / 2, 0].map((ago, i) => svg("text",
      { x: x(now - ago), y: HEIGHT - 6, "text-anchor": ["start", "middle", "end"][i] }, ago ? `−${ago} s` : "now"));
    const paths = this.lines.map(([name], i) => svg("path", { class: `line ${name}`, d: this.#path(i + 1, x, y) }));
    this.plot.replaceChildren(...grid, ...ticks, ...paths);
    const last = this.lines.map(([, text], i) => `${text} ${number(this.points.at(-1)[i + 1])}`).join(", ");
    this.plot.setAttribute("aria-label", `${this.title} in ${this.unit}, now: ${last}`);
  }

  #path(line, x, y) {
    let d = "";
    let pen = false;
    for (const point of this.points) {
      const value = point[line];
      if (Number.isFinite(value)) d += `${pen ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(value).toFixed(1)}h.01`;
      pen = Number.isFinite(value);
    }
    return d;
  }
}
