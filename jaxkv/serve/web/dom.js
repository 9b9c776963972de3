// Elements in one expression, text as numbers read well, and speech that does not stammer.

export const $ = (selector, root = document) => root.querySelector(selector);

const SVG = "http://www.w3.org/2000/svg";

// h("button", {class: "x", onclick: f, "aria-label": "Close"}, "text", element): children may be null.
export const h = (tag, props = {}, ...children) => fill(document.createElement(tag), props, children);
export const svg = (tag, props = {}, ...children) => fill(document.createElementNS(SVG, tag), props, children);

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

export function number(value, digits = 1) {
  if (value == null || !Number.isFinite(value)) return "–";
  return value.toLocaleString("en", { maximumFractionDigits: Math.abs(value) >= 100 ? 0 : digits });
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${number(value)} ${units[unit]}`;
}

export const TIERS = [["hbm", "HBM"], ["host", "Host memory"], ["disk", "Disk"]];

// A legend of [class, text] pairs; the same swatches stand for the same things everywhere.
export const legend = (items) => h("ul", { class: "legend" },
  ...items.map(([name, text]) => h("li", {}, h("i", { class: `swatch ${name}`, "aria-hidden": "true" }), text)));

// Says streamed text to screen readers in whole pieces, at most one every few seconds.
export class Speaker {
  #pause = 3000;
  #text = "";
  #timer = 0;

  add(text) {
    this.#text += text;
    this.#timer ||= setTimeout(() => this.#say(false), this.#pause);
  }

  end(text) {
    this.#text += ` ${text}`;
    clearTimeout(this.#timer);
    this.#say(true);
  }

  #say(all) {
    this.#timer = 0;
    const cut = all ? this.#text.length : Math.max(this.#text.lastIndexOf(" "), this.#text.lastIndexOf("\n")) + 1;
    if (cut) {
      const log = $("#live");
      log.append(h("p", {}, this.#text.slice(0, cut)));
      while (log.children.length > 20) log.firstChild.remove();
    }
    this.#text = this.#text.slice(cut);
  }
}
