// The frame of the page: views, colours, errors, and whether the server is well.

import { getJson } from "./api.js";
import { Dashboard } from "./dashboard.js";
import { $ } from "./dom.js";
import { startPlayground } from "./playground.js";

const VIEWS = ["chat", "complete", "dashboard"];
const RETRY_MS = 1000; // while the model loads or the server is away
const CHECK_MS = 5000;

function showError(error) {
  const status = error.status ? `${error.status}: ` : "";
  const after = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  $("#alert span").textContent = `${status}${error.message}${after}`;
  $("#alert").hidden = false;
  watch(false);
}

function clearError() {
  $("#alert").hidden = true;
}

const dashboard = new Dashboard();

function showView() {
  const asked = location.hash.slice(1);
  if (asked === "main") return; // the skip link
  const view = VIEWS.includes(asked) ? asked : "chat";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  $("#playground").hidden = view === "dashboard";
  $("#chat").hidden = view !== "chat";
  $("#complete").hidden = view !== "complete";
  $(".chat-only").hidden = view !== "chat";
  $("#dashboard").hidden = view !== "dashboard";
  dashboard.show(view === "dashboard");
  scrollTo(0, 0);
}

let next = 0;

async function watch(ask = true) {
  clearTimeout(next);
  let state = "ready";
  try {
    if (!$("#model").textContent) $("#model").textContent = (await getJson("/v1/models", { ask })).data[0].id;
    else await getJson("/health");
  } catch (error) {
    state = { 401: "no key", 503: error.message.replace(/^the (model|server) is /, "") }[error.status] ?? "away";
  }
  if ($("#state").textContent !== state) $("#state").textContent = state; // read out when it changes
  $("#state").dataset.ok = state === "ready";
  clearTimeout(next);
  next = setTimeout(watch, state === "ready" ? CHECK_MS : RETRY_MS, state !== "no key"); // asked once: a Send asks again
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("#theme").value = theme;
  localStorage.setItem("jaxkv-theme", theme);
}

setTheme(localStorage.getItem("jaxkv-theme") ?? "");
$("#theme").addEventListener("change", (event) => setTheme(event.target.value));
$("#alert button").addEventListener("click", clearError);
$("#settings").open = matchMedia("(min-width: 900px)").matches;
addEventListener("hashchange", showView);
startPlayground({ model: () => $("#model").textContent, showError, clearError });
showView();
watch();
