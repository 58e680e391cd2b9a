// Chat: a conversation that is kept here and sent whole; the server takes in only what is new.
import { $, answer, busy, button, call, complain, copy, keep, kept, make, settings } from "./common.js";

const fine = (turn) => ["user", "assistant"].includes(turn?.role) && typeof turn.content === "string";
let turns = [];
let context = Infinity;

export function open(about) {
  context = about.context;
  turns = Array.isArray(kept.turns) && kept.turns.every(fine) ? kept.turns : [];
  show();
}

function show() {
  $("turns").replaceChildren(...turns.map(turnNode));
  $("chat-empty").hidden = turns.length > 0;
  $("turns").lastElementChild?.scrollIntoView({ block: "nearest" });
}

function turnNode(turn, i) {
  const text = make("div", { className: "said", textContent: turn.content || "(nothing)" });
  const node = make("li", { className: turn.role }, make("span", { className: "who quiet", textContent: turn.role === "user" ? "You" : "Model" }), text);
  if (turn.role === "user") return node;
  const acts = make("p", { className: "small" });
  const copying = button("Copy", "Copy this answer", () => copy(turn.content, copying));
  acts.append(copying, button("Regenerate", "Ask for this answer again; what came after it goes", () => ask(turns.slice(0, i))));
  if (i < turns.length - 1) acts.append(button("Continue from here", "Forget what came after this answer", () => {
    if (busy()) return;
    turns = turns.slice(0, i + 1);
    keep({ turns });
    show();
    $("say").focus();
  }));
  node.append(acts);
  return node;
}

// The newest turns that leave room for an answer, as `lrt chat` keeps them: the oldest are left out first.
async function fitting(history, most) {
  const room = Math.min(most ?? context, Math.floor(context / 4));
  for (let first = 0; ; first += 2) {
    const messages = history.slice(first);
    const last = messages.length <= 2; // then the server says what is wrong with it
    try {
      const { count } = await (await call("tokenize", { messages })).json();
      if (count + room <= context || last) return { messages, dropped: first };
    } catch (error) {
      if (error.code !== "context_length_exceeded" || last) throw error;
    }
  }
}

// Ask for the answer to a history that ends with the user's turn; `taken()` once the server has it.
async function ask(history, taken = () => {}) {
  const body = settings();
  if (!body || busy()) return;
  let text, dropped = 0;
  const reply = { role: "assistant", content: "" };
  const pace = await answer("v1/chat/completions", async () => {
    const fits = await fitting(history, body.max_tokens);
    dropped = fits.dropped;
    return { ...body, messages: fits.messages };
  }, () => {
    turns = [...history, reply];
    show();
    text = $("turns").lastElementChild.querySelector(".said");
    text.textContent = "";
    $("chat-pace").textContent = "";
    taken();
  }, (piece) => {
    reply.content += piece;
    text.textContent = reply.content.trimStart();
    $("turns").lastElementChild.scrollIntoView({ block: "nearest" });
  });
  reply.content = reply.content.trim();
  if (text) {
    keep({ turns });
    show();
  }
  const forgotten = dropped ? `the context is full: the oldest ${dropped / 2} exchange${dropped > 2 ? "s" : ""} not sent` : "";
  if (text) $("chat-pace").textContent = [typeof pace === "string" ? pace : "", forgotten].filter(Boolean).join("; ");
}

export async function say() {
  const content = $("say").value.trim();
  if (!content || busy()) return;
  await ask([...turns, { role: "user", content }], () => {
    $("say").value = "";
    keep({ say: "" });
  });
}

$("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  say();
});
$("say").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.stopPropagation();
  say();
});
$("say").addEventListener("input", () => keep({ say: $("say").value }));
$("new").addEventListener("click", () => {
  turns = [];
  keep({ turns });
  complain("");
  $("chat-pace").textContent = "";
  show();
  $("say").focus();
});
