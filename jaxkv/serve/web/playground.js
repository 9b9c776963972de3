// Chat and completion: what is sent, the answer as it streams, and what the KV cache had of its prompt.

import { postJson, stream } from "./api.js";
import { $, h, number, Speaker } from "./dom.js";
import { originBar, originsOf, textsOfVocabulary, tokensOf, tokenView } from "./tokens.js";

const TOP = 5; // alternatives of each token

function settings() {
  const form = $("#settings form");
  const body = {};
  for (const input of form.querySelectorAll("input[type=number]")) {
    if (input.value !== "") body[input.name] = input.valueAsNumber;
  }
  const stop = form.elements.stop.value.split("\n").filter(Boolean);
  if (stop.length) body.stop = stop;
  return { body, system: form.elements.system.value.trim(), tokens: form.elements.tokens.checked };
}

// One answer on the page, from its first token to its facts.
class Answer {
  constructor(place, label, source) {
    this.source = source; // what /tokenize gets to spell out the prompt
    this.thought = h("div", { class: "thought", hidden: true }); // what the model reasons before it answers
    this.text = h("div", { class: "text" });
    this.foot = h("footer", {});
    this.element = h("article", { class: "answer", "aria-label": label, "aria-busy": "true" },
      this.thought, this.text, this.foot);
    this.speaker = new Speaker();
    this.waiting = ""; // text for the next frame
    this.frame = 0;
    this.turn = { promptIds: null, usage: null, tokens: [], finish: null };
    place.append(this.element);
  }

  async run(path, body, signal) {
    const { turn } = this;
    const start = performance.now();
    try {
      for await (const event of stream(path, body, signal)) {
        const choice = event.choices[0];
        turn.usage = event.usage ?? turn.usage;
        turn.promptIds ??= event.prompt_token_ids ?? choice?.prompt_token_ids ?? null;
        if (!choice) continue;
        turn.tokens.push(...tokensOf(choice));
        turn.finish = choice.finish_reason ?? turn.finish;
        const thought = choice.delta?.reasoning_content ?? "";
        this.thought.append(thought);
        this.thought.hidden &&= !thought;
        const piece = choice.text ?? choice.delta.content ?? "";
        if (piece || choice.token_ids?.length) {
          turn.last = performance.now() - start;
          turn.first ??= turn.last;
        }
        this.waiting += piece;
        this.frame ||= requestAnimationFrame(() => this.#write());
        this.speaker.add(piece);
      }
    } catch (error) {
      this.#write();
      if (error.name !== "AbortError") throw error;
      if (this.text.textContent) turn.finish = "stopped";
    } finally {
      this.#end();
    }
  }

  // Once a frame, however fast tokens come; who reads the end goes on seeing it.
  #write() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const below = document.body.scrollHeight - innerHeight - scrollY;
    this.text.append(this.waiting);
    this.waiting = "";
    if (below < 50) scrollTo(0, document.body.scrollHeight);
  }

  get content() {
    return this.text.textContent;
  }

  #end() {
    const { turn } = this;
    this.#write();
    this.element.removeAttribute("aria-busy");
    if (!turn.usage) return this.speaker.end(turn.finish ?? "broken off");
    const { prompt_tokens: prompt, completion_tokens: made, prompt_tokens_details: found } = turn.usage;
    const tiers = originsOf(turn.usage).filter(([kind, count]) => count && kind !== "computed");
    const where = tiers.map(([, count, name]) => `${number(count)} ${name}`).join(", ");
    const facts = [
      `prompt ${number(prompt)} tokens, ${number(found.cached_tokens)} cached${where && ` (${where})`}`,
      `answer ${number(made)} tokens`,
      turn.first && `first after ${number(turn.first)} ms`,
      turn.last > turn.first && `then ${number(1000 * (made - 1) / (turn.last - turn.first))} tokens/s`,
      turn.finish ?? "broken off",
    ].filter(Boolean);
    this.foot.replaceChildren(originBar(turn.usage), h("p", { class: "facts dim" }, facts.join(" · ")));
    if (turn.promptIds) {
      const view = h("div", { hidden: true });
      const button = h("button", { type: "button", class: "plain", "aria-expanded": "false",
        onclick: () => this.#toggle(button, view) }, "Tokens");
      this.foot.append(button, view);
    }
    this.speaker.end(`${turn.finish ?? "broken off"}: ${made} tokens.`);
  }

  async #toggle(button, view) {
    view.hidden = !view.hidden;
    button.setAttribute("aria-expanded", String(!view.hidden));
    if (view.hidden || view.firstChild) return;
    const { promptIds } = this.turn;
    const spelt = await postJson("/tokenize", { ...this.source, return_token_strs: true }).catch(() => null);
    const same = spelt?.tokens.join() === promptIds.join();
    view.replaceChildren(tokenView(this.turn, same ? textsOfVocabulary(spelt.token_strs) : null));
  }
}

// Runs one answer at a time for a form; its Stop button aborts it, which frees its pages at once.
function runner(form, page, work) {
  const [send, stop] = [$(".primary", form), $(".stop", form)];
  let abort = null;
  stop.addEventListener("click", () => abort?.abort());
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (abort) return;
    abort = new AbortController();
    page.clearError();
    send.disabled = true;
    stop.disabled = false;
    try {
      await work(abort.signal);
    } catch (error) {
      page.showError(error);
    } finally {
      const stopping = document.activeElement === stop;
      abort = null;
      send.disabled = false;
      stop.disabled = true;
      if (stopping) $("textarea", form).focus();
    }
  });
  $("textarea", form).addEventListener("keydown", (event) => {
    const plain = form.id === "ask" ? !event.shiftKey : event.ctrlKey || event.metaKey;
    if (event.key === "Enter" && plain && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  return () => abort?.abort();
}

const details = (wanted, top) => ({ return_token_ids: wanted, ...(wanted && top) });

export function startPlayground(page) {
  const place = $("#messages");
  const empty = place.firstElementChild;
  let messages = [];

  const stopChat = runner($("#ask"), page, async (signal) => {
    const question = $("#question").value;
    if (!question.trim()) return;
    const { body, system, tokens } = settings();
    const sent = [...(system ? [{ role: "system", content: system }] : []), ...messages, { role: "user", content: question }];
    const source = { model: page.model(), messages: sent };
    const mine = messages; // a new chat has others
    const said = h("article", { class: "question", "aria-label": "You" }, question);
    empty.remove();
    place.append(said);
    const answer = new Answer(place, "Answer", { ...source, add_generation_prompt: true });
    $("#question").value = "";
    answer.element.scrollIntoView({ block: "nearest" });
    try {
      await answer.run("/v1/chat/completions",
        { ...source, ...body, ...details(tokens, { logprobs: true, top_logprobs: TOP }) }, signal);
    } finally {
      if (answer.turn.finish) {
        mine.push({ role: "user", content: question }, { role: "assistant", content: answer.content });
      } else if (!answer.content) { // nothing came: as if it had not been asked
        said.remove();
        answer.element.remove();
        if (mine === messages) $("#question").value ||= question;
      }
    }
  });
  $("#fresh").addEventListener("click", () => {
    stopChat();
    messages = [];
    place.replaceChildren(empty);
    $("#question").focus();
  });

  runner($("#finish"), page, async (signal) => {
    const { body, tokens } = settings();
    const source = { model: page.model(), prompt: $("#prompt").value };
    $("#completion").replaceChildren();
    const answer = new Answer($("#completion"), "Completion", source);
    answer.text.append(h("span", { class: "given" }, source.prompt));
    await answer.run("/v1/completions", { ...source, ...body, ...details(tokens, { logprobs: TOP }) }, signal);
  });
}
