// The page: Write streams a continuation, Inspect shows what the memory did to a text. No library, no outside host.
const $ = (id) => document.getElementById(id);
const make = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
};

let key = "";
let about = null;

function complain(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

async function call(path, body, signal) {
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
  const said = await response.json().catch(() => null);
  throw new Error(said?.error?.message ?? `The server answers ${response.status}.`);
}

async function connect() {
  try {
    about = await (await call("api/about")).json();
  } catch (error) {
    $("about").textContent = "not connected";
    return complain(error.message);
  }
  complain("");
  $("key").hidden = true;
  $("name").textContent = about.name;
  document.title = about.name;
  const memory = about.memory ? `${about.memory} memory from block ${about.source}` : "no memory";
  $("about").textContent =
    `${about.depth} blocks of width ${about.width}, ${memory}, context ${about.context}, trained ${about.schedule}`;
  $("write-form").elements.max_tokens.max = about.max_output;
}

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key-value").value;
  connect();
});

// Tabs: one in the order of focus, arrows move between them.
const tabs = [...document.querySelectorAll("[role=tab]")];
function show(name, focus = false) {
  for (const tab of tabs) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
  if (name === "inspect" && found) paint();
}
for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => show(tab.id.slice(4)));
  tab.addEventListener("keydown", (event) => {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (way) show(tabs[(i + way + tabs.length) % tabs.length].id.slice(4), true);
  });
}

// Write
let running = null;
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The server stopped in the middle of the answer.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function write() {
  if (running) return;
  const form = new FormData($("write-form"));
  const body = { prompt: $("prompt").value, stream: true, stream_options: { include_usage: true } };
  for (const [name, value] of form) if (value !== "") body[name] = Number(value);
  const answer = make("span");
  $("text").replaceChildren(make("span", { className: "given", textContent: body.prompt }), answer);
  $("text").classList.add("running");
  $("go").disabled = true;
  $("stop").disabled = false;
  $("to-inspect").hidden = true;
  $("pace").textContent = "";
  complain("");
  running = new AbortController();
  const began = performance.now();
  try {
    for await (const event of events(await call("v1/completions", body, running.signal))) {
      if (event.error) throw new Error(event.error.message);
      answer.append(event.choices.map((choice) => choice.text).join(""));
      if (event.usage) {
        const n = event.usage.completion_tokens;
        $("pace").textContent = `${n} tokens, ${(n / ((performance.now() - began) / 1000)).toFixed(0)} a second`;
      }
    }
  } catch (error) {
    const broken = error instanceof TypeError ? "The server stopped in the middle of the answer." : error.message;
    if (error.name === "AbortError") $("pace").textContent = "stopped";
    else complain(broken);
  }
  running = null;
  $("text").classList.remove("running");
  $("go").disabled = false;
  $("stop").disabled = true;
  $("to-inspect").hidden = !answer.textContent;
}

$("write-form").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
$("stop").addEventListener("click", () => running?.abort());
$("to-inspect").addEventListener("click", () => {
  $("text-in").value = $("text").textContent;
  show("inspect", true);
  inspect();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("write").hidden ? inspect() : write();
});

// Inspect
let found = null;
let chosen = 0;
const FULL = 2; // nats at which a colour is full
const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 10 ? `${p.toFixed(0)} %` : p >= 0.1 ? `${p.toFixed(1)} %` : `${p.toExponential(0)} %`;
};
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";

async function inspect() {
  complain("");
  $("look").disabled = true;
  try {
    found = await (await call("api/inspect", { text: $("text-in").value })).json();
    about = found.model;
    chosen = 0;
    $("result").hidden = false;
    summarise();
    listTokens();
    paint();
  } catch (error) {
    complain(error.message);
  }
  $("look").disabled = false;
}

function summarise() {
  const { decoded, zero } = found.bpb;
  const digits = (x) => (x === null ? "none" : x.toFixed(3));
  const rows = [["decoded with memory, bits per byte", digits(decoded)], ["memory reset at every token", digits(zero)]];
  if (decoded !== null && zero !== null) rows.push(["difference", `${decoded <= zero ? "−" : "+"}${Math.abs(decoded - zero).toFixed(3)}`]);
  rows.push(["tokens", found.tokens.length]);
  $("totals").replaceChildren(...rows.map(([term, value]) => make("div", {}, make("dt", { textContent: term }), make("dd", { textContent: value }))));
  const note = !about.memory && !about.residual ? "This model has no memory: both modes are the same."
    : about.trained_without_memory ? ""
    : `This model was never trained without memory (${about.schedule}): with the memory reset it is out of its element, so the differences say more about its training than about each token.`;
  $("note").textContent = note;
  $("note").hidden = !note;
}

const gain = (token) => token.decoded.logprob - token.zero.logprob;

function listTokens() {
  $("tokens").replaceChildren(...found.tokens.map((token, i) => {
    const odd = token.text.startsWith("bytes:") || !token.bytes.length;
    const node = make("span", { textContent: token.text, className: odd ? "odd" : "", id: `token-${i}`, tabIndex: -1 });
    node.setAttribute("role", "option");
    const much = Math.min(1, Math.abs(gain(token)) / FULL);
    node.style.setProperty("--tint", gain(token) >= 0 ? "var(--more)" : "var(--less)");
    node.style.setProperty("--much", `${Math.round(62 * much)}%`);
    node.setAttribute("aria-label", `${visible(token.text)}, ${percent(token.decoded.logprob)} with memory, ${percent(token.zero.logprob)} without`);
    node.addEventListener("click", () => choose(i, true));
    node.addEventListener("mouseenter", () => choose(i));
    return node;
  }));
  choose(0);
}

function choose(i, focus = false) {
  const nodes = $("tokens").children;
  if (!nodes.length) return;
  const old = nodes[chosen];
  old?.removeAttribute("aria-selected");
  if (old) old.tabIndex = -1;
  chosen = Math.max(0, Math.min(nodes.length - 1, i));
  nodes[chosen].setAttribute("aria-selected", "true");
  nodes[chosen].tabIndex = 0;
  if (focus) nodes[chosen].focus();
  describe();
  paint();
}

$("tokens").addEventListener("keydown", (event) => {
  const to = { ArrowRight: chosen + 1, ArrowLeft: chosen - 1, Home: 0, End: Infinity }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(to, true);
});

function describe() {
  const token = found.tokens[chosen];
  const nats = gain(token);
  const effect = Math.abs(nats) < 0.005 ? "left it as it was"
    : `made it ${Math.exp(Math.abs(nats)) > 1000 ? "over 1000" : Math.exp(Math.abs(nats)).toFixed(2)} times ${nats > 0 ? "more" : "less"} probable (${nats > 0 ? "+" : "−"}${Math.abs(nats).toFixed(2)} nats)`;
  const table = (name, mode) => make("table", {},
    make("caption", { textContent: `${name}: ${percent(mode.logprob)}` }),
    make("tbody", {}, ...mode.top.map(([text, logprob]) => make("tr", { className: text === token.text ? "hit" : "" },
      make("td", {}, make("code", { textContent: visible(text) })),
      make("td", { textContent: percent(logprob) }),
      make("td", {}, make("meter", { min: 0, max: 1, value: Math.exp(logprob) }))))));
  $("detail").replaceChildren(
    make("p", {}, make("code", { textContent: visible(token.text) }), ` Token ${chosen + 1} of ${found.tokens.length}: the memory ${effect}.`),
    make("div", { className: "columns" }, table("With memory", token.decoded), table("Memory reset", token.zero)));
}

// The heat map: a row per layer, a column per token.
const ROW = 22;
const scheme = matchMedia("(prefers-color-scheme: dark)");
function paint() {
  if (!found || $("inspect").hidden) return;
  const rows = found.strength[document.querySelector("input[name=kind]:checked").value];
  const columns = found.tokens.length;
  const room = $("heat").parentElement.clientWidth;
  const wide = Math.max(6, Math.min(28, room / columns));
  const canvas = $("heat"), scale = devicePixelRatio;
  canvas.style.width = `${wide * columns}px`;
  canvas.style.height = `${ROW * rows.length}px`;
  canvas.width = wide * columns * scale;
  canvas.height = ROW * rows.length * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const most = Math.max(...rows.flat(), 1e-9);
  rows.forEach((row, layer) => row.forEach((x, i) => {
    const share = Math.sqrt(x / most); // so that weak layers can be seen beside strong ones
    pen.fillStyle = scheme.matches ? `oklch(${0.24 + 0.6 * share} ${0.02 + 0.13 * share} ${285 - 195 * share})`
      : `oklch(${0.97 - 0.55 * share} ${0.01 + 0.14 * share} ${230 + 50 * share})`;
    pen.fillRect(i * wide, layer * ROW, wide - (wide > 9 ? 1 : 0), ROW - 1);
  }));
  pen.strokeStyle = getComputedStyle(document.body).color;
  pen.lineWidth = 1.5;
  pen.strokeRect(chosen * wide + 0.75, 0.75, Math.max(2, wide - 2.5), ROW * rows.length - 2.5);
  $("layers").replaceChildren(...rows.map((_, layer) => make("span", { textContent: `block ${layer + 1}` })));
  const at = rows.map((row, layer) => `block ${layer + 1}: ${row[chosen].toFixed(3)}`).join(", ");
  $("heat-says").textContent = `Size of the memory's part relative to the rest, before “${visible(found.tokens[chosen].text)}”: ${at}`;
  canvas.setAttribute("aria-label", `Heat map of ${rows.length} blocks by ${columns} tokens; the strongest is ${most.toFixed(2)}`);
}
const column = (event) => Math.floor((event.offsetX / $("heat").clientWidth) * found.tokens.length);
$("heat").addEventListener("mousemove", (event) => choose(column(event)));
$("heat").addEventListener("click", (event) => choose(column(event), true));
for (const radio of document.querySelectorAll("input[name=kind]")) radio.addEventListener("change", paint);
scheme.addEventListener("change", paint);
addEventListener("resize", paint);
$("inspect-form").addEventListener("submit", (event) => {
  event.preventDefault();
  inspect();
});

connect();
