// Tokens one by one: where the KV of a prompt's came from, how likely an answer's were.

import { h, legend, number } from "./dom.js";

const MOST = 4000; // prompt tokens shown; of a longer prompt the middle is left out
const utf8 = new TextDecoder("utf-8", { fatal: true });

// Text of a token's bytes; parts of a character as \xe2.
export function textOfBytes(bytes) {
  try {
    return utf8.decode(Uint8Array.from(bytes));
  } catch {
    return bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
  }
}

// GPT-2's table: the character that stands for a byte in a byte-level vocabulary -> the byte.
const BYTE_OF = new Map();
for (let byte = 0, next = 256; byte < 256; byte += 1) {
  const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  BYTE_OF.set(String.fromCharCode(printable ? byte : next++), byte);
}

// Texts of tokens as their vocabulary spells them: SentencePiece ("▁the"), which one of them gives away, or byte-level
// ("Ġthe").
export function textsOfVocabulary(tokens) {
  if (tokens.some((token) => token.includes("▁"))) return tokens.map((token) => token.replaceAll("▁", " "));
  return tokens.map((token) => {
    const bytes = [...token].map((character) => BYTE_OF.get(character));
    return bytes.includes(undefined) ? token : textOfBytes(bytes);
  });
}

// The tokens of one entry of `choices`: {id, text, logprob, top: [[text, logprob]]}, of chat or of completions.
export function tokensOf(choice) {
  const found = choice.logprobs;
  const ids = choice.token_ids ?? [];
  if (found?.content) {
    return found.content.map((entry, i) => ({
      id: ids[i], text: textOfBytes(entry.bytes), logprob: entry.logprob,
      top: entry.top_logprobs.map((other) => [textOfBytes(other.bytes), other.logprob]),
    }));
  }
  return (found?.tokens ?? []).map((text, i) => ({
    id: ids[i], text: text.replace(/^bytes:/, ""), logprob: found.token_logprobs[i],
    top: Object.entries(found.top_logprobs?.[i] ?? {}).map(([other, value]) => [other.replace(/^bytes:/, ""), value])
      .sort((a, b) => b[1] - a[1]),
  }));
}

// How many prompt tokens came from where, in the order of their positions: a path is in HBM, then in host memory, then
// on disk, and what follows was computed.
export function originsOf(usage) {
  const details = usage.prompt_tokens_details;
  const { hbm, host, disk } = details.cached_tokens_by_tier;
  return [["hbm", hbm, "HBM"], ["host", host, "host memory"], ["disk", disk, "disk"],
    ["computed", usage.prompt_tokens - details.cached_tokens, "computed"]];
}

// A stacked bar of the origins.
export function originBar(usage) {
  const parts = originsOf(usage).filter(([, count]) => count);
  const bar = h("div", { class: "origins", role: "img",
    "aria-label": `Prompt: ${parts.map(([, count, name]) => `${count} tokens ${name}`).join(", ")}` });
  for (const [name, count] of parts) {
    const part = h("span", { class: name });
    part.style.flexGrow = count;
    bar.append(part);
  }
  return bar;
}

const visible = (text) => text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t") || "∅";
const percent = (logprob) => `${number(100 * Math.exp(logprob), 2)} %`;

function details(token) {
  const facts = [token.id == null ? null : `id ${token.id}`, token.where, token.logprob == null ? null :
    `log-probability ${number(token.logprob, 3)}, ${percent(token.logprob)}`].filter(Boolean).join(" · ");
  const rows = (token.top ?? []).map(([text, logprob]) => {
    const bar = h("span", { class: "likely" });
    bar.style.width = `${100 * Math.exp(logprob)}%`;
    return h("tr", {}, h("td", {}, h("code", {}, visible(text))), h("td", {}, percent(logprob)), h("td", {}, bar));
  });
  return [h("p", {}, h("code", {}, visible(token.text)), ` ${facts}`),
    rows.length ? h("table", {}, h("caption", { class: "hidden" }, "Most likely tokens here"), h("tbody", {}, ...rows)) : ""];
}

function list(label, tokens, panel) {
  const box = h("div", { class: "toks", role: "listbox", "aria-label": `${label}, ${tokens.length}; arrow keys move` });
  const shown = new Map();
  for (const token of tokens) {
    const likely = token.logprob == null ? "" : `p${Math.min(4, Math.floor(5 * Math.exp(token.logprob)))}`;
    const name = token.logprob == null ? token.where : percent(token.logprob);
    const span = h("span", { class: `tok ${token.origin ?? likely}`, role: "option", tabindex: shown.size ? -1 : 0,
      "aria-label": `${visible(token.text)}, ${name ?? ""}` }, visible(token.text));
    shown.set(span, token);
    box.append(span);
  }
  const show = (event) => {
    const token = shown.get(event.target);
    if (token) panel.replaceChildren(...details(token));
  };
  box.addEventListener("mouseover", show);
  box.addEventListener("focusin", show);
  box.addEventListener("keydown", (event) => {
    const all = [...shown.keys()];
    const at = all.indexOf(event.target);
    const last = all.length - 1;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + 10, ArrowUp: at - 10, Home: 0, End: last }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    const next = all[Math.max(0, Math.min(last, to))];
    next.tabIndex = 0;
    next.focus();
  });
  return box;
}

function promptTokens(ids, texts, usage) {
  const origins = originsOf(usage).flatMap(([name, count, where]) => Array(count).fill([name, where]));
  const tokens = ids.map((id, i) => ({ id, text: texts?.[i] ?? `#${id}`, origin: origins[i]?.[0],
    where: `position ${i}, ${origins[i]?.[0] === "computed" ? "computed" : `cached: ${origins[i]?.[1]}`}` }));
  if (tokens.length <= MOST) return tokens;
  const left = tokens.length - MOST;
  return [...tokens.slice(0, MOST / 2), { text: ` … ${left} tokens … `, where: "left out" }, ...tokens.slice(-MOST / 2)];
}

// The view of a finished turn. texts: of the prompt's tokens, null if the server cannot tell.
export function tokenView({ promptIds, usage, tokens }, texts) {
  const panel = h("div", { class: "panel", "aria-live": "polite" },
    h("p", { class: "dim" }, "Point at a token, or focus one with Tab and move with the arrow keys."));
  return h("div", { class: "tokenview" },
    h("h3", {}, "Prompt"), legend(originsOf(usage).map(([name, count, text]) => [name, `${text} ${number(count)}`])),
    list("Prompt tokens", promptTokens(promptIds, texts, usage), panel),
    h("h3", {}, "Answer"), legend([["p4", "likely"], ["p2", "less so"], ["p0", "unlikely"]]),
    list("Answer tokens", tokens, panel), panel);
}
