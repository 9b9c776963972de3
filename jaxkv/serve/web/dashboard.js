// The live view: what the server does this second, how full each tier is, and the prefix trie.

import { ApiError, getJson } from "./api.js";
import { Chart } from "./chart.js";
import { $, bytes, h, legend, number, TIERS } from "./dom.js";
import { Trie } from "./trie.js";

const STATS_MS = 1000;
const TRIE_MS = 3000; // at least; and thirty times what the answer took, for the engine stands still meanwhile
const TRIE_SHARE = 30;

const rate = (now, before, name) => (now[name] - before[name]) / (now.time - before.time);
const mean = (now, before, name) => 1000 * (now[name].sum - before[name].sum) / (now[name].count - before[name].count);

// Numbers of the seconds between two answers of /debug/stats; NaN where nothing happened.
function between(now, before) {
  return {
    generated: rate(now, before, "generation_tokens"),
    computed: rate(now, before, "computed_tokens"),
    first: mean(now, before, "time_to_first_token"),
    gap: mean(now, before, "inter_token"),
    hit: 100 * (now.prefix_hit_tokens - before.prefix_hit_tokens) / (now.prefix_query_tokens - before.prefix_query_tokens),
  };
}

export class Dashboard {
  #shown = false;
  #last = null;
  #round = 0;
  #tiles = new Map();
  #trie = new Trie($("#trie"), () => this.show(true));

  constructor() {
    for (const name of ["Generated tokens/s", "First token, ms", "Between tokens, ms", "Running", "Waiting", "Hit rate",
      "Generated tokens", "Prompt tokens"]) {
      const value = h("dd", {}, "–");
      this.#tiles.set(name, value);
      $("#tiles").append(h("dl", { class: "card" }, h("dt", {}, name), value));
    }
    this.charts = {
      speed: new Chart("Throughput", "tokens/s", [["s1", "generated"], ["s2", "computed, prompts too"]]),
      first: new Chart("Time to first token", "ms, mean of a second", [["s1", "first token"]]),
      load: new Chart("Sequences", "count", [["s1", "running"], ["s2", "waiting"]]),
      hit: new Chart("Prefix hit rate", "% of prompt tokens", [["s1", "hit rate"]], 100),
    };
    $("#charts").append(...Object.values(this.charts).map((chart) => chart.element));
    document.addEventListener("visibilitychange", () => this.show(this.#shown));
  }

  // Asks the server only while somebody looks.
  show(shown) {
    this.#shown = shown;
    this.#round += 1;
    this.#last = null;
    if (!shown || document.hidden) return;
    this.#repeat(() => this.#updateStats());
    this.#repeat(() => this.#updateTrie());
  }

  // Runs work, waits as many milliseconds as it says, and again, until the next show().
  async #repeat(work) {
    const round = this.#round;
    while (round === this.#round) {
      let pause = TRIE_MS;
      try {
        pause = await work();
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        this.#last = null; // the header says what is wrong
      }
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }

  async #updateStats() {
    const now = await getJson("/debug/stats", { ask: false });
    if (now.prompt_tokens < this.#last?.prompt_tokens) this.#last = null; // another process
    this.#show(now);
    this.#last = now;
    return STATS_MS;
  }

  async #updateTrie() {
    const start = performance.now();
    const answer = await getJson(`/debug/kv?top=${$("#top").value}`, { ask: false });
    const took = performance.now() - start;
    this.#trie.update(answer);
    return Math.max(TRIE_MS, TRIE_SHARE * took);
  }

  #show(now) {
    const step = this.#last && between(now, this.#last);
    const values = {
      "Generated tokens/s": number(step?.generated),
      "First token, ms": number(step?.first),
      "Between tokens, ms": number(step?.gap, 2),
      Running: number(now.running),
      Waiting: number(now.waiting),
      "Generated tokens": now.generation_tokens.toLocaleString("en"),
      "Prompt tokens": now.prompt_tokens.toLocaleString("en"),
      "Hit rate": now.prefix_query_tokens ? `${number(100 * now.prefix_hit_tokens / now.prefix_query_tokens)} %` : "–",
    };
    for (const [name, value] of Object.entries(values)) {
      if (value !== "–") this.#tiles.get(name).textContent = value; // the latest of what there was
    }
    this.#showTiers(now.tiers);
    if (!step) return;
    this.charts.speed.add(now.time, step.generated, step.computed);
    this.charts.first.add(now.time, step.first);
    this.charts.load.add(now.time, now.running, now.waiting);
    this.charts.hit.add(now.time, step.hit);
  }

  #showTiers(tiers) {
    $("#tiers").replaceChildren(h("h2", {}, "KV memory"), ...TIERS.map(([name, text]) => tierRow(name, text, tiers[name])),
      legend([["hbm active", "held by running sequences"], ["hbm", "cached, may leave for others"]]));
  }
}

// How full a tier is: by pages, or by bytes where their number is not fixed.
function tierRow(name, text, tier) {
  const share = (tier.pages_total ? tier.pages_used / tier.pages_total : tier.bytes_used / tier.bytes_total) || 0;
  const active = tier.pages_total ? tier.pages_active / tier.pages_total : 0;
  const label = tier.bytes_total ? `${bytes(tier.bytes_used)} of ${bytes(tier.bytes_total)}` : "not in use";
  const bar = h("div", { class: "fill", role: "meter", "aria-label": `${text} used`, "aria-valuemin": 0, "aria-valuemax": 100,
    "aria-valuenow": Math.round(100 * share), "aria-valuetext": label });
  for (const [part, kind] of [[active, `${name} active`], [Math.max(0, share - active), name]]) {
    const span = h("span", { class: kind });
    span.style.width = `${100 * part}%`;
    bar.append(span);
  }
  const facts = [label, `${number(tier.pages_used)}${tier.pages_total ? ` of ${number(tier.pages_total)}` : ""} pages`,
    name === "hbm" && `${number(tier.pages_active)} held by running sequences`];
  return h("div", { class: "tier", "data-tier": name }, h("b", {}, text), bar,
    h("span", { class: "dim" }, facts.filter(Boolean).join(" · ")));
}
