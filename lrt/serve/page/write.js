// Write: a prompt is continued, again or further.
import { $, answer, copy, keep, keptText, make, settings } from "./common.js";

let asked = null; // the prompt of the answer that is shown

async function write(prompt) {
  const body = settings();
  if (!body) return;
  const text = make("span");
  const pace = await answer("v1/completions", () => ({ ...body, prompt }), () => {
    asked = prompt;
    $("text").replaceChildren(make("span", { className: "given", textContent: prompt }), text);
    $("pace").textContent = "";
    $("after").hidden = true;
  }, (piece) => text.append(piece));
  if (typeof pace === "string") $("pace").textContent = pace;
  $("after").hidden = asked === null;
}

export const begin = () => write($("prompt").value);

// The whole text, or up to the end of what is selected in it.
function upToHere() {
  const chosen = getSelection();
  const range = document.createRange();
  range.selectNodeContents($("text"));
  if (!chosen.isCollapsed && $("text").contains(chosen.anchorNode) && $("text").contains(chosen.focusNode)) {
    const { endContainer, endOffset } = chosen.getRangeAt(0);
    range.setEnd(endContainer, endOffset);
  }
  return range.toString();
}

function short(text) {
  const line = text.split("\n")[0];
  return line.length < text.trim().length || line.length > 32 ? `${line.slice(0, 32)} …` : line;
}

export function offer(prompts) {
  $("prompts").replaceChildren(...prompts.map((text) => {
    const chip = make("button", { type: "button", textContent: short(text), title: text, className: "chip" });
    chip.addEventListener("click", () => {
      $("prompt").value = text;
      keep({ prompt: text });
      $("prompt").focus();
    });
    return chip;
  }));
  $("prompt").value = keptText("prompt") ?? prompts[0] ?? "";
}

$("write-form").addEventListener("submit", (event) => {
  event.preventDefault();
  begin();
});
$("prompt").addEventListener("input", () => keep({ prompt: $("prompt").value }));
$("again").addEventListener("click", () => write(asked));
$("further").addEventListener("click", () => write(upToHere()));
$("copy").addEventListener("click", () => copy($("text").textContent, $("copy")));
