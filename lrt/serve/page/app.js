// The page: Write and Chat stream answers, Inspect shows what the memory did to a text.
import { $, call, complain, corrected, keep, kept, keptText, setKey, stop } from "./common.js";
import * as chat from "./chat.js";
import * as inspecting from "./inspect.js";
import * as writing from "./write.js";

const GO = { write: writing.begin, chat: chat.say, inspect: inspecting.inspect };

const LOST = "not connected";

async function connect() {
  let about;
  try {
    about = await (await call("api/about")).json();
  } catch (error) {
    $("about").textContent = LOST;
    return complain(error.message);
  }
  complain("");
  $("key").hidden = true;
  $("name").textContent = about.name;
  document.title = about.name;
  const memory = about.memory ? `memory from block ${about.source}` : "no memory";
  $("about").textContent = `${about.depth} blocks of width ${about.width}, ${memory}, context of ${about.context} tokens`;
  $("about").title = `trained by the schedule ${about.schedule}`;
  $("settings").elements.max_tokens.max = about.max_output;
  if (kept.model !== about.name) keep({ model: about.name, prompt: null, text: null, turns: null, say: null }); // of another model
  writing.offer(about.prompts);
  inspecting.open(about);
  chat.open(about);
  $("say").value = keptText("say") ?? "";
}

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key-value").value);
  connect();
});

// Tabs: one in the order of focus, arrows move between them.
const tabs = [...document.querySelectorAll("[role=tab]")];
const nameOf = (tab) => tab.id.slice("tab-".length);
function show(name, focus = false) {
  for (const tab of tabs) {
    const chosen = nameOf(tab) === name;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
  if (kept.tab !== name && $("about").textContent !== LOST) complain(""); // it was of the other view
  $("settings-box").hidden = name === "inspect";
  keep({ tab: name });
  if (name === "inspect") inspecting.paint();
}
for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => show(nameOf(tab)));
  tab.addEventListener("keydown", (event) => {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (way) show(nameOf(tabs[(i + way + tabs.length) % tabs.length]), true);
  });
}
$("to-inspect").addEventListener("click", () => {
  $("text-in").value = $("text").textContent;
  show("inspect", true);
  inspecting.inspect();
});

// Keys: Escape stops, Control and Enter asks in whichever view is shown.
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) GO[nameOf(tabs.find((tab) => tab.tabIndex === 0))]();
});
for (const node of document.querySelectorAll(".stop")) node.addEventListener("click", stop);

// Settings are kept; fields that the page does not have are ignored.
const fields = $("settings").elements;
for (const [name, value] of Object.entries(kept.settings ?? {})) if (fields[name]?.name === name && typeof value === "string") fields[name].value = value;
$("settings").addEventListener("input", () => {
  keep({ settings: Object.fromEntries(new FormData($("settings"))) });
  corrected();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("reset").addEventListener("click", () => {
  $("settings").reset();
  keep({ settings: {} });
  corrected();
});
const small = matchMedia("(max-width: 40rem)");
$("settings-box").open = typeof kept.open === "boolean" ? kept.open : !small.matches;
$("settings-box").addEventListener("toggle", () => keep({ open: $("settings-box").open }));

// Light and dark: the system's, until the switch is used.
const system = matchMedia("(prefers-color-scheme: dark)");
function theme() {
  const chosen = ["light", "dark"].includes(kept.theme) ? kept.theme : system.matches ? "dark" : "light";
  document.documentElement.dataset.theme = chosen;
  const other = chosen === "dark" ? "light" : "dark";
  $("theme").textContent = other === "dark" ? "☾" : "☀";
  $("theme").title = `Change to ${other}`;
  $("theme").setAttribute("aria-label", `Change to ${other}`);
  inspecting.paint();
}
$("theme").addEventListener("click", () => {
  keep({ theme: document.documentElement.dataset.theme === "dark" ? "light" : "dark" });
  theme();
});
system.addEventListener("change", theme);

theme();
show(tabs.some((tab) => nameOf(tab) === kept.tab) ? kept.tab : "write");
connect();
