"""The page at ``/``: one question, two adapters side by side."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Veneer</title>
<style>
  :root { color-scheme: light dark; --line: #c8c8cc; --soft: #f3f3f5; --ink: #1b1b1f; --paper: #fff; --mark: #0b57d0; }
  @media (prefers-color-scheme: dark) {
    :root { --line: #45454b; --soft: #26262b; --ink: #ececf0; --paper: #17171a; --mark: #9cc2ff; }
  }
  * { box-sizing: border-box; }
  body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
         display: flex; flex-direction: column; height: 100dvh; }
  header { display: flex; gap: .75rem; align-items: center; padding: .5rem 1rem; border-bottom: 1px solid var(--line); }
  h1 { font-size: 1.1rem; margin: 0; flex: 1; }
  main { flex: 1; min-height: 0; display: grid; grid-template-columns: 1fr 1fr; }
  section { min-width: 0; display: flex; flex-direction: column; border-right: 1px solid var(--line); }
  section:last-child { border: 0; }
  label { padding: .5rem 1rem; display: flex; gap: .5rem; align-items: center; }
  .talk { flex: 1; overflow-y: auto; padding: 0 1rem 1rem; }
  .talk p { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; padding: .5rem .75rem;
            border-radius: .5rem; }
  .user { background: var(--soft); }
  .fault { color: #b3261e; }
  @media (prefers-color-scheme: dark) { .fault { color: #ffb4ab; } }
  .note { font-size: .8rem; opacity: .75; padding: 0 1rem .5rem; min-height: 1.6rem; }
  form { display: flex; gap: .5rem; padding: .75rem 1rem; border-top: 1px solid var(--line); }
  textarea, input, select, button { font: inherit; color: inherit; background: var(--paper);
    border: 1px solid var(--line); border-radius: .5rem; padding: .4rem .6rem; }
  textarea { flex: 1; resize: none; min-width: 0; }
  label input { flex: 1; min-width: 0; }
  button { background: var(--mark); color: var(--paper); border: 0; min-width: 4.5rem; min-height: 2.75rem; }
  button.plain { background: none; color: inherit; border: 1px solid var(--line); }
  :focus-visible { outline: 2px solid var(--mark); outline-offset: 1px; }
  @media (max-width: 640px) {
    main { grid-template-columns: 1fr; grid-template-rows: 1fr 1fr; }
    section { border-right: 0; border-bottom: 1px solid var(--line); min-height: 0; }
    label { padding: .25rem 1rem; }
  }
</style>
<header><h1>Veneer</h1><button class="plain" id="fresh" type="button">Start over</button></header>
<main>
  <section aria-label="left"><label>Model <input list="models" data-side="0"></label>
    <div class="talk" aria-live="polite"></div><div class="note"></div></section>
  <section aria-label="right"><label>Model <input list="models" data-side="1"></label>
    <div class="talk" aria-live="polite"></div><div class="note"></div></section>
</main>
<datalist id="models"></datalist>
<form><textarea id="say" rows="2" aria-label="Message"
    placeholder="Ask both. Models may be blends: a*0.7+b*0.3"></textarea>
  <button id="send">Send</button></form>
<script>
const sides = [...document.querySelectorAll("section")].map((s) => ({
  model: s.querySelector("input"), talk: s.querySelector(".talk"), note: s.querySelector(".note"), said: [] }));
let stop = null;
let token = sessionStorage.getItem("token") || "";
const headers = () => ({ "Content-Type": "application/json", ...(token && { Authorization: "Bearer " + token }) });
async function call(path, options = {}) {
  let found = await fetch(path, { ...options, headers: headers() });
  if (found.status === 401 && (token = prompt("This server wants a token") || "")) {
    sessionStorage.setItem("token", token);
    found = await fetch(path, { ...options, headers: headers() });
  }
  if (!found.ok) {
    const body = await found.json().catch(() => null);
    throw new Error(body?.error?.message || "the server answered " + found.status);
  }
  return found;
}
function paragraph(side, kind, text) {
  const p = document.createElement("p");
  p.className = kind; p.textContent = text;
  side.talk.append(p); side.talk.scrollTop = side.talk.scrollHeight;
  return p;
}
async function ask(side, text, signal) {
  side.said.push({ role: "user", content: text });
  paragraph(side, "user", text);
  const p = paragraph(side, "answer", "");
  const began = performance.now();
  let count = 0, first = null, answer = "", rest = "";
  try {
    const body = { model: side.model.value, messages: side.said, stream: true, temperature: 0.7, max_tokens: 512 };
    const found = await call("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    const reader = found.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const event = JSON.parse(line.slice(6));
        if (event.error) throw new Error(event.error.message);
        const piece = event.choices?.[0]?.delta?.content || "";
        if (!piece) continue;
        first ??= performance.now() - began;
        count += 1; answer += piece; p.textContent = answer;
        side.talk.scrollTop = side.talk.scrollHeight;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") { p.className = "fault"; p.textContent = answer + error.message; }
  }
  side.said.push({ role: "assistant", content: answer });
  const seconds = (performance.now() - began) / 1000;
  side.note.textContent = first === null ? "" :
    `first token ${(first / 1000).toFixed(2)} s, ${(count / seconds).toFixed(1)} pieces/s`;
}
document.querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const box = document.querySelector("#say"), button = document.querySelector("#send");
  if (stop) { stop.abort(); return; }
  const text = box.value.trim();
  if (!text) return;
  box.value = ""; button.textContent = "Stop"; stop = new AbortController();
  await Promise.all(sides.map((side) => ask(side, text, stop.signal)));
  stop = null; button.textContent = "Send"; box.focus();
});
document.querySelector("#say").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault(); if (!stop) event.target.form.requestSubmit();
  }
});
document.querySelector("#fresh").addEventListener("click", () => {
  stop?.abort();
  for (const side of sides) { side.said = []; side.talk.replaceChildren(); side.note.textContent = ""; }
});
(async () => {
  try {
    const { data } = await (await call("v1/models")).json();
    document.querySelector("#models").replaceChildren(...data.map((m) => new Option(m.id, m.id)));
    sides[0].model.value = data[0].id;
    sides[1].model.value = (data[1] || data[0]).id;
  } catch (error) { paragraph(sides[0], "fault", error.message); }
})();
</script>
</html>
"""
