// What all views share: the document, the server, the settings, and what survives a reload. No library, no outside host.
export const $ = (id) => document.getElementById(id);
export const make = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
};
export const button = (text, title, act) => {
  const node = make("button", { type: "button", textContent: text, title });
  node.addEventListener("click", act);
  return node;
};

export function complain(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

// What survives a reload. A browser that keeps nothing loses it, and that is all.
const KEY = "lrt-page";
export const kept = (() => {
  try {
    const read = JSON.parse(localStorage.getItem(KEY));
    return read && typeof read === "object" && !Array.isArray(read) ? read : {};
  } catch {
    return {};
  }
})();
export function keep(changes) {
  Object.assign(kept, changes);
  try {
    localStorage.setItem(KEY, JSON.stringify(kept));
  } catch {
    // full, or forbidden
  }
}
export const keptText = (name) => (typeof kept[name] === "string" ? kept[name] : null);

// The server.
let key = "";
export const setKey = (value) => { key = value; };
export const BROKEN = "The server stopped in the middle of the answer.";

export async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body), signal } : { headers, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is it still running?");
  }
  if (response.ok) return response;
  $("key").hidden = response.status !== 401;
  const told = (await response.json().catch(() => null))?.error;
  throw Object.assign(new Error(told?.message ?? `The server answers ${response.status}.`), { code: told?.code });
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error(BROKEN);
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// One answer at a time, whichever view asked for it.
let running = null;
export const stop = () => running?.abort();
export const busy = () => running !== null;
function mark(going) {
  document.body.classList.toggle("running", going);
  for (const node of document.querySelectorAll(".ask")) node.disabled = going;
  for (const node of document.querySelectorAll(".stop")) node.disabled = !going;
}

// Ask for an answer. `begin()` is called once the server has taken the request, then `add(text)` piece by piece. What goes
// wrong is shown, and returned as false; the last answer stays until another one begins. Returns the pace as a text, or true.
export async function answer(path, makeBody, begin, add) {
  if (running) return false;
  running = new AbortController();
  mark(true);
  complain("");
  const began = performance.now();
  let pace = true, cut = false;
  try {
    const body = { ...(await makeBody()), stream: true, stream_options: { include_usage: true } };
    const response = await call(path, body, running.signal);
    begin();
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      cut ||= event.choices.some((choice) => choice.finish_reason === "length");
      add(event.choices.map((choice) => choice.text ?? choice.delta.content ?? "").join(""));
      if (event.usage) {
        const n = event.usage.completion_tokens;
        pace = `${n} tokens, ${(n / ((performance.now() - began) / 1000)).toFixed(0)} a second${cut ? "; stopped at the length that was asked for" : ""}`;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") pace = "stopped";
    else {
      complain(error instanceof TypeError ? BROKEN : error.message);
      pace = false;
    }
  }
  running = null;
  mark(false);
  return pace;
}

// The settings, checked whichever way an answer is asked for.
const MOST_STOPS = 15, LONGEST_STOP = 200; // the server's, less the one that ends a turn
export const stops = () => $("stops").value.split("\n").filter((line) => line).map((line) => line.replaceAll("\\n", "\n"));

function checkStops() {
  const texts = stops();
  const wrong = texts.length > MOST_STOPS ? `Give at most ${MOST_STOPS} texts.`
    : texts.some((text) => text.length > LONGEST_STOP) ? `A text may have ${LONGEST_STOP} characters.` : "";
  $("stops").setCustomValidity(wrong);
}

let blamed = false; // whether a setting is named as wrong
function firstWrong() {
  checkStops();
  return [...$("settings").elements].find((field) => field.willValidate && !field.checkValidity());
}

// The settings as fields of a request, or null: a value is wrong, and said to be.
export function settings() {
  const wrong = firstWrong();
  if (wrong) {
    $("settings-box").open = true;
    $("settings").reportValidity();
    complain(`${wrong.labels[0].dataset.name}: ${wrong.validationMessage}`);
    blamed = true;
    return null;
  }
  const body = {};
  for (const [name, value] of new FormData($("settings"))) if (value !== "" && name !== "stop") body[name] = Number(value);
  return stops().length ? { ...body, stop: stops() } : body;
}

// What was said of a setting goes once it is right.
export function corrected() {
  if (!blamed || firstWrong()) return;
  blamed = false;
  complain("");
}

export async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // an address that is not secure has no clipboard
    const area = make("textarea", { value: text, className: "unseen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const label = from.textContent;
  from.textContent = "Copied";
  setTimeout(() => { from.textContent = label; }, 1200);
}
