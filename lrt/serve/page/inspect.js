// Inspect: what the memory did to every token of a text.
import { $, call, complain, keep, keptText, make } from "./common.js";

let about = null;
let scored = null;
let chosen = 0;
const LEAST_FULL = 0.1, MOST_FULL = 2; // nats at which a colour is full: those of the strongest token, within these
const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 10 ? `${p.toFixed(0)} %` : p >= 0.1 ? `${p.toFixed(1)} %` : `${p.toExponential(0)} %`;
};
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";

export function open(model) {
  about = model;
  const longest = [...model.prompts].sort((a, b) => b.length - a.length)[0] ?? "";
  if (!$("text-in").value) $("text-in").value = keptText("text") ?? longest;
}

// Tokens that are no text by themselves, such as the bytes of an emoji, are shown together at the first of them.
function showTogether(tokens) {
  const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  const read = (part) => {
    try {
      return utf8.decode(new Uint8Array(part.flatMap((token) => token.bytes)));
    } catch {
      return null;
    }
  };
  for (const token of tokens) Object.assign(token, { shown: token.text, part: "" });
  for (let i = 0; i < tokens.length; i++) {
    if (!tokens[i].bytes.length || read([tokens[i]]) !== null) continue;
    for (let end = i + 2; end <= Math.min(i + 4, tokens.length); end++) {
      const group = tokens.slice(i, end), text = read(group);
      if (text === null) continue;
      group.forEach((token, k) => Object.assign(token, { shown: k ? "" : text, part: `part ${k + 1} of ${group.length} of ${text}` }));
      i = end - 1;
      break;
    }
  }
}

export async function inspect() {
  if ($("look").disabled) return;
  complain("");
  $("look").disabled = true;
  try {
    scored = await (await call("api/inspect", { text: $("text-in").value })).json();
    about = scored.model;
    showTogether(scored.tokens);
    chosen = 0;
    $("result").hidden = false;
    $("inspect-empty").hidden = true;
    summarise();
    listTokens();
    paint();
  } catch (error) {
    complain(error.message);
  }
  $("look").disabled = false;
}

function summarise() {
  const { decoded, zero } = scored.bpb;
  const digits = (x) => (x === null ? "none" : x.toFixed(3));
  const rows = [[`decoded with memory, bits per byte${scored.normalised ? " of the normalised text" : ""} (lower is better)`, digits(decoded)], ["memory reset at every token", digits(zero)]];
  if (decoded !== null && zero !== null) rows.push(["difference", `${decoded <= zero ? "−" : "+"}${Math.abs(decoded - zero).toFixed(3)}`]);
  rows.push(["tokens", scored.tokens.length]);
  $("totals").replaceChildren(...rows.map(([term, value]) => make("div", {}, make("dt", { textContent: term }), make("dd", { textContent: value }))));
  const note = !about.memory && !about.residual ? "This model has no memory: both modes are the same."
    : about.trained_without_memory ? ""
    : `This model was never trained without memory (${about.schedule}): with the memory reset it is out of its element, so the differences say more about its training than about each token.`;
  $("note").textContent = note;
  $("note").hidden = !note;
}

const named = (token) => token.part || visible(token.text);
const gain = (token) => token.decoded.logprob - token.zero.logprob;

function listTokens() {
  const full = Math.min(MOST_FULL, Math.max(LEAST_FULL, ...scored.tokens.map((token) => Math.abs(gain(token)))));
  $("least-gain").textContent = `less probable, −${full.toFixed(2)} nats`;
  $("most-gain").textContent = `more probable, +${full.toFixed(2)} nats`;
  $("tokens").replaceChildren(...scored.tokens.map((token, i) => {
    const odd = token.part ? "" : token.text.startsWith("bytes:") || !token.bytes.length ? "odd" : "";
    const node = make("span", { textContent: token.shown, className: token.shown ? odd : "rest", id: `token-${i}`, tabIndex: -1 });
    node.setAttribute("role", "option");
    const much = Math.min(1, Math.abs(gain(token)) / full);
    node.style.setProperty("--tint", gain(token) >= 0 ? "var(--more)" : "var(--less)");
    node.style.setProperty("--much", `${Math.round(62 * much)}%`);
    node.setAttribute("aria-label", `${named(token)}, ${percent(token.decoded.logprob)} with memory, ${percent(token.zero.logprob)} without`);
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
  const token = scored.tokens[chosen];
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
    make("p", {}, make("code", { textContent: named(token) }), ` Token ${chosen + 1} of ${scored.tokens.length}: the memory ${effect}.`),
    make("div", { className: "columns" }, table("With memory", token.decoded), table("Memory reset", token.zero)));
}

// The heat map: a row per layer, a column per token.
function shade(part) {
  const share = Math.sqrt(part); // so that weak layers can be seen beside strong ones
  return document.documentElement.dataset.theme === "dark"
    ? `oklch(${0.24 + 0.6 * share} ${0.02 + 0.13 * share} ${285 - 195 * share})`
    : `oklch(${0.97 - 0.55 * share} ${0.01 + 0.14 * share} ${230 + 50 * share})`;
}

function paintLegend(most) {
  const { width, height } = $("shade"), pen = $("shade").getContext("2d");
  for (let x = 0; x < width; x++) {
    pen.fillStyle = shade(x / (width - 1));
    pen.fillRect(x, 0, 1, height);
  }
  $("most").textContent = `${most.toFixed(2)} times the rest`;
}

const ROW = 22;
export function paint() {
  if (!scored || $("inspect").hidden) return;
  const rows = scored.strength[document.querySelector("input[name=kind]:checked").value];
  const columns = scored.tokens.length;
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
    pen.fillStyle = shade(x / most);
    pen.fillRect(i * wide, layer * ROW, wide - (wide > 9 ? 1 : 0), ROW - 1);
  }));
  paintLegend(most);
  pen.strokeStyle = getComputedStyle(document.body).color;
  pen.lineWidth = 1.5;
  pen.strokeRect(chosen * wide + 0.75, 0.75, Math.max(2, wide - 2.5), ROW * rows.length - 2.5);
  $("layers").replaceChildren(...rows.map((_, layer) => make("span", { textContent: `block ${layer + 1}` })));
  const at = rows.map((row, layer) => `block ${layer + 1}: ${row[chosen].toFixed(3)}`).join(", ");
  $("heat-says").textContent = `Size of the memory's part relative to the rest, before “${named(scored.tokens[chosen])}”: ${at}`;
  canvas.setAttribute("aria-label", `Heat map of ${rows.length} blocks by ${columns} tokens; the strongest is ${most.toFixed(2)}`);
}
const column = (event) => Math.floor((event.offsetX / $("heat").clientWidth) * scored.tokens.length);
$("heat").addEventListener("mousemove", (event) => choose(column(event)));
$("heat").addEventListener("click", (event) => choose(column(event), true));
for (const radio of document.querySelectorAll("input[name=kind]")) radio.addEventListener("change", paint);
addEventListener("resize", paint);
$("inspect-form").addEventListener("submit", (event) => {
  event.preventDefault();
  inspect();
});
$("text-in").addEventListener("input", () => keep({ text: $("text-in").value }));
