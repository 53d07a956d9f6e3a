"""The page at ``/``: one question, two adapters side by side."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, viewport-fit=cover">
<meta name="color-scheme" content="light dark">
<meta name="theme-color" content="#f6f5f2" media="(prefers-color-scheme: light)">
<meta name="theme-color" content="#141416" media="(prefers-color-scheme: dark)">
<title>Veneer</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; --ground: #f6f5f2; --paper: #fff; --line: #dcd9d2; --ink: #1d1b18; --faint: #66625a;
          --mark: #8a4b1f; --on-mark: #fff; --tint: #f3e7dc; --fault: #b3261e; }
  @media (prefers-color-scheme: dark) {
    :root { --ground: #141416; --paper: #1d1d20; --line: #37373c; --ink: #ececee; --faint: #a3a2a8;
            --mark: #e8b083; --on-mark: #2b1706; --tint: #3a2a1e; --fault: #ffb4ab; }
  }
  * { box-sizing: border-box; }
  body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
         display: flex; flex-direction: column; height: 100dvh;
         padding: env(safe-area-inset-top) env(safe-area-inset-right) env(safe-area-inset-bottom)
                  env(safe-area-inset-left); }
  header { display: flex; gap: .75rem; align-items: center; padding: .6rem 1rem .2rem; }
  h1 { font-size: 1.15rem; letter-spacing: .01em; margin: 0; flex: 1; }
  main { flex: 1; min-height: 0; display: grid; grid-template-columns: 1fr 1fr; gap: .75rem; padding: .5rem 1rem 0; }
  section { min-width: 0; min-height: 0; display: flex; flex-direction: column; background: var(--paper);
            border: 1px solid var(--line); border-radius: .9rem; overflow: hidden; }
  label { padding: .4rem .75rem; display: flex; gap: .5rem; align-items: center; border-bottom: 1px solid var(--line);
          color: var(--faint); font-size: .9rem; }
  .talk { flex: 1; overflow-y: auto; overscroll-behavior: contain; padding: .25rem .75rem .75rem; display: flex;
          flex-direction: column; }
  .talk p { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; padding: .45rem .8rem;
            border-radius: .9rem; max-width: 65ch; }
  .user { background: var(--tint); align-self: flex-end; border-bottom-right-radius: .25rem; }
  .talk .answer { padding-left: .2rem; }
  .answer:empty::before { content: "…"; color: var(--faint); }
  .fault { color: var(--fault); }
  .note { font-size: .8rem; color: var(--faint); padding: 0 .95rem .4rem; min-height: 1.6rem; }
  form { display: flex; gap: .6rem; align-items: end; padding: .75rem 1rem; }
  textarea, input, button { font: inherit; font-size: 1rem; color: var(--ink); background: var(--paper);
    border: 1px solid var(--line); border-radius: .75rem; padding: .5rem .75rem; min-height: 2.75rem; }
  textarea { flex: 1; resize: none; min-width: 0; }
  textarea::placeholder { color: var(--faint); opacity: 1; }
  label input { flex: 1; min-width: 0; border-color: transparent; font-weight: 600; padding: .3rem .5rem; }
  button { background: var(--mark); color: var(--on-mark); border: 0; min-width: 5rem; font-weight: 600;
           cursor: pointer; }
  button.plain { background: none; color: inherit; border: 1px solid var(--line); font-weight: 400; }
  :focus-visible { outline: 2px solid var(--mark); outline-offset: 1px; }
  @media (max-width: 640px) {
    main { grid-template-columns: 1fr; grid-template-rows: 1fr 1fr; gap: .5rem; padding: .4rem .6rem 0; }
    header { padding: .4rem .9rem 0; }
    form { padding: .6rem; }
    label { padding: 0 .75rem; }
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
    if (error.name !== "AbortError") { p.className = "answer fault"; p.textContent = answer + error.message; }
  }
  if (answer) side.said.push({ role: "assistant", content: answer });
  else side.said.pop();  // a question without an answer is not asked again with the next
  const seconds = (performance.now() - began) / 1000;
  side.note.textContent = first === null ? "" :
    `first token ${(first / 1000).toFixed(2)} s, ${(count / Math.max(seconds, 0.001)).toFixed(1)} pieces/s`;
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
