// The prefix trie as a tree that can be zoomed and walked: colour is the tier, size and strength are how often a node
// was hit, a hollow node is an answer's.

import { postJson } from "./api.js";
import { $, h, legend, number, svg } from "./dom.js";

const [NARROW, WIDE, ROW, MARGIN] = [60, 360, 30, 40]; // pixels at scale 1: a level, a row, the border of the view
const [SMALLEST, LARGEST] = [0.05, 4];
const TIER_TEXT = { HBM: "HBM", HOST: "host memory", DISK: "disk" };

// Nodes with {children, depth, x, y} in the order of a walk, below a root that stands for the empty prefix; as wide as
// aspect times the height where levels can be stretched so far.
function layout(rows, aspect) {
  const root = { digest: "", parent: null, children: [], depth: 0, pages: 0, pages_below: 0, children_total: 0 };
  const known = new Map([[null, root], ["", root]]);
  for (const row of rows) known.set(row.digest, { ...row, children: [], children_total: row.children });
  for (const row of rows) known.get(row.parent).children.push(known.get(row.digest));
  const order = [];
  let leaf = 0;
  const stack = [[root, 0]]; // node and its next child: without recursion, for a path may be long
  while (stack.length) {
    const frame = stack.at(-1);
    const [node, next] = frame;
    if (next === 0) {
      order.push(node);
      node.children.sort((a, b) => b.pages_below - a.pages_below);
    }
    if (next < node.children.length) {
      frame[1] += 1;
      const child = node.children[next];
      child.up = node;
      child.depth = node.depth + 1;
      stack.push([child, 0]);
    } else {
      node.y = node.children.length ? (node.children[0].y + node.children.at(-1).y) / 2 : ROW * leaf++;
      stack.pop();
    }
  }
  const level = aspect * leaf * ROW / Math.max(1, ...order.map((node) => node.depth));
  for (const node of order) node.x = node.depth * Math.max(NARROW, Math.min(WIDE, level));
  return order;
}

const writer = (node) => node.kind === "ANSWER" ? "Answer" : "Prompt";
const name = (node) => node.up ? `${writer(node)}, ${TIER_TEXT[node.tier]}, ${node.tokens} tokens, ${node.hits} hits`
  : "Root: the empty prefix";
const radius = (node) => node.up ? Math.min(15, 5 + 2 * Math.log2(1 + node.hits)) : 5;

export class Trie {
  #order = [];
  #byDigest = new Map();
  #selected = "";
  #zoomed = ""; // digest of the node that fills the view; "" is the whole tree, null a view of the user's own
  #view = { x: 0, y: 0, k: 1 };
  #texts = new Map();
  #said = "";
  #seen = "";

  constructor(element, refresh) {
    this.element = element;
    this.tree = $("#tree", element);
    this.world = svg("g", { role: "none" });
    this.tree.append(this.world);
    $("#top", element).addEventListener("change", refresh);
    $("#trielegend", element).append(legend([["hbm", "HBM"], ["host", "host memory"], ["disk", "on disk too"],
      ["hollow", "answer"], ["big", "larger and stronger: more hits"]]));
    for (const button of element.querySelectorAll("[data-view]")) {
      button.addEventListener("click", () => this.#button(button.dataset.view));
    }
    const pointed = (event) => event.target.closest("[data-digest]")?.dataset.digest;
    this.tree.addEventListener("keydown", (event) => this.#key(event));
    this.tree.addEventListener("click", (event) => this.#select(pointed(event)));
    this.tree.addEventListener("dblclick", (event) => this.#zoom(pointed(event) ?? ""));
    this.tree.addEventListener("focusin", (event) => this.#select(event.target.dataset.digest));
    this.tree.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    this.#drag();
    new ResizeObserver(() => this.#zoomed != null && this.#zoom(this.#zoomed)).observe(this.tree);
  }

  update(answer) {
    $("#shown", this.element).textContent = `${number(answer.nodes.length)} of ${number(answer.nodes_total)} nodes${answer.sampled ? ", from a sample" : ""}`;
    const seen = JSON.stringify(answer.nodes);
    if (this.#seen === seen) return; // what is pointed at stays the same element
    this.#seen = seen;
    const focused = this.tree.contains(document.activeElement);
    const [width, height] = this.#size();
    this.#order = layout(answer.nodes, width / height);
    this.#byDigest = new Map(this.#order.map((node) => [node.digest, node]));
    if (!this.#byDigest.has(this.#selected)) this.#selected = "";
    this.#draw();
    if (this.#zoomed != null) this.#zoom(this.#byDigest.has(this.#zoomed) ? this.#zoomed : "");
    else this.#apply();
    if (focused) this.#focus(this.#selected);
    else this.#details();
  }

  #draw() {
    const links = this.#order.filter((node) => node.up).map(({ x, y, up, tier }) => {
      const middle = (up.x + x) / 2;
      const d = `M${up.x} ${up.y}C${middle} ${up.y} ${middle} ${y} ${x} ${y}`;
      return svg("path", { class: `link ${tier.toLowerCase()}`, d });
    });
    this.world.replaceChildren(...links, ...this.#order.map((node) => this.#circle(node)));
  }

  #circle(node) {
    const r = radius(node);
    const hidden = node.children_total - node.children.length;
    const strength = node.kind === "PROMPT" ? Math.min(1, 0.45 + 0.14 * Math.log2(1 + node.hits)) : null;
    return svg("g", {
      class: `node ${node.up ? `${node.tier.toLowerCase()} by-${node.kind.toLowerCase()}` : "root"}`,
      transform: `translate(${node.x} ${node.y})`, role: "treeitem", "data-digest": node.digest, "aria-label": name(node),
      "aria-level": node.depth + 1, "aria-expanded": node.children.length ? "true" : null,
      "aria-selected": String(node.digest === this.#selected), tabindex: node.digest === this.#selected ? 0 : -1,
    },
    svg("circle", { class: "ring", r: r + 4 }),
    svg("circle", { class: "dot", r, "fill-opacity": strength }),
    node.on_disk ? svg("circle", { class: "disk mark", r: 3, cx: r, cy: r }) : null,
    svg("text", { y: -r - 5, "text-anchor": "middle" }, node.up ? `${node.tokens}` : "root"),
    hidden > 0 ? svg("text", { x: r + 6, y: 4 }, `+${hidden}`) : null);
  }

  #size() {
    return [this.tree.clientWidth || 1, this.tree.clientHeight || 1];
  }

  #apply() {
    const { x, y, k } = this.#view;
    this.world.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)}) scale(${k.toFixed(4)})`);
  }

  // Show a node and all below it as large as they fit.
  #zoom(digest) {
    const top = this.#byDigest.get(digest);
    if (!top) return;
    this.#zoomed = digest;
    const from = this.#order.indexOf(top);
    let to = from + 1;
    while (to < this.#order.length && this.#order[to].depth > top.depth) to += 1;
    const part = this.#order.slice(from, to);
    const [xs, ys] = [part.map((node) => node.x), part.map((node) => node.y)];
    const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const [width, height] = this.#size();
    const [wide, tall] = [(width - 2 * MARGIN) / (right - left || 1), (height - 2 * MARGIN) / (high - low || 1)];
    const k = Math.max(SMALLEST, Math.min(1.6, wide, tall));
    this.#view = { k, x: width / 2 - k * (left + right) / 2, y: height / 2 - k * (low + high) / 2 };
    this.#apply();
  }

  #scale(factor, [x, y] = this.#size().map((side) => side / 2)) {
    const view = this.#view;
    const k = Math.max(SMALLEST, Math.min(LARGEST, view.k * factor));
    this.#view = { k, x: x - (x - view.x) * k / view.k, y: y - (y - view.y) * k / view.k };
    this.#zoomed = null;
    this.#apply();
  }

  #move(x, y) {
    this.#view = { ...this.#view, x: this.#view.x + x, y: this.#view.y + y };
    this.#zoomed = null;
    this.#apply();
  }

  #button(view) {
    if (view === "all") this.#zoom("");
    else this.#scale(view === "in" ? 1.4 : 1 / 1.4);
  }

  #wheel(event) {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    const box = this.tree.getBoundingClientRect();
    this.#scale(Math.exp(-event.deltaY / 200), [event.clientX - box.left, event.clientY - box.top]);
  }

  #drag() {
    let last = null;
    this.tree.addEventListener("pointerdown", (event) => { last = event; });
    addEventListener("pointerup", () => { last = null; });
    this.tree.addEventListener("pointercancel", () => { last = null; });
    this.tree.addEventListener("pointermove", (event) => {
      if (!last) return;
      this.#move(event.clientX - last.clientX, event.clientY - last.clientY);
      last = event;
    });
  }

  #key(event) {
    const at = this.#order.findIndex((node) => node.digest === this.#selected);
    const node = this.#order[at];
    if (!node || event.ctrlKey || event.metaKey || event.altKey) return;
    const to = { ArrowDown: this.#order[at + 1], ArrowUp: this.#order[at - 1], ArrowRight: node.children[0], ArrowLeft: node.up,
      Home: this.#order[0], End: this.#order.at(-1) };
    if (event.key in to) {
      if (to[event.key]) this.#focus(to[event.key].digest);
    } else if (event.key === "Enter") this.#zoom(this.#zoomed === node.digest ? "" : node.digest);
    else if (event.key === "Escape") this.#zoom("");
    else if (event.key === "+") this.#scale(1.4);
    else if (event.key === "-") this.#scale(1 / 1.4);
    else return;
    event.preventDefault();
  }

  #item(digest) {
    return this.world.querySelector(`[data-digest="${digest}"]`);
  }

  #focus(digest) {
    this.#select(digest);
    this.#item(digest)?.focus({ preventScroll: true });
    const node = this.#byDigest.get(digest);
    const [width, height] = this.#size();
    const [x, y] = [this.#view.x + this.#view.k * node.x, this.#view.y + this.#view.k * node.y];
    if (x < MARGIN / 2 || y < MARGIN / 2 || x > width - MARGIN / 2 || y > height - MARGIN / 2) {
      this.#move(width / 2 - x, height / 2 - y);
    }
  }

  #select(digest) {
    if (digest === undefined || !this.#byDigest.has(digest)) return;
    for (const [old, on] of [[this.#selected, false], [digest, true]]) {
      this.#item(old)?.setAttribute("tabindex", on ? 0 : -1);
      this.#item(old)?.setAttribute("aria-selected", String(on));
    }
    this.#selected = digest;
    this.#details();
  }

  async #details() {
    const node = this.#byDigest.get(this.#selected);
    const panel = $("#node", this.element);
    if (!node?.up) {
      const hint = this.#order.length > 1 ? "Select a node to see whose KV it holds." : "The cache is empty. Ask something.";
      if (panel.textContent !== hint) panel.replaceChildren(h("p", { class: "dim" }, hint));
      return;
    }
    const text = await this.#text(node);
    if (this.#selected !== node.digest) return;
    const where = [TIER_TEXT[node.tier], node.on_disk && `${number(node.on_disk)} pages on disk too`, node.coming && "coming"];
    const facts = [
      ["Written by", node.kind === "ANSWER" ? "an answer" : "a prompt"],
      ["Tier", where.filter(Boolean).join(", ")],
      ["Tokens", `${number(node.tokens)} from position ${number(node.start)}`],
      ["Pages", `${number(node.pages)}, with all below ${number(node.pages_below)}`],
      ["Hits", number(node.hits)],
      ["In use by", `${number(node.users)} sequences`],
      ["Children", number(node.children_total)],
    ];
    const said = JSON.stringify([text, facts]); // nothing new is not read out again
    if (this.#said === said && panel.querySelector("dl")) return;
    this.#said = said;
    const rows = facts.flatMap(([key, value]) => [h("dt", {}, key), h("dd", {}, value)]);
    panel.replaceChildren(h("pre", {}, text), h("dl", {}, ...rows));
  }

  async #text(node) {
    if (node.head === null) return "Not shown: this prefix has a cache_salt.";
    const known = this.#texts.get(node.digest);
    if (known?.of === node.head.length) return known.text;
    let text = node.head.map((id) => `#${id}`).join(" ");
    try {
      text = (await postJson("/detokenize", { tokens: node.head })).prompt;
    } catch { /* a server without tokenizer: the ids stay */ }
    text += node.tokens > node.head.length ? " …" : "";
    this.#texts.set(node.digest, { text, of: node.head.length });
    if (this.#texts.size > 1000) this.#texts.delete(this.#texts.keys().next().value);
    return text;
  }
}
