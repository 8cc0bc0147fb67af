"""The chat page of the server: one file without anything from elsewhere."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>OpenMoE</title>
<style>
:root { color-scheme: light dark; --back: #fff; --text: #1b1b1b; --soft: #f1f3f5; --line: #c9ced6;
  --mine: #0b5cad; --on: #fff; --bad: #a4262c; }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --text: #e8e8e8; --soft: #24282f;
  --line: #444a55; --mine: #2f7fd0; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; background: var(--back);
  color: var(--text); display: flex; flex-direction: column; height: 100vh; }
header, form { padding: .7rem max(1rem, calc(50vw - 24rem)); }
header { border-bottom: 1px solid var(--line); display: flex; gap: 1rem; flex-wrap: wrap;
  align-items: baseline; }
header b { margin-right: auto; overflow-wrap: anywhere; }
main { flex: 1; overflow-y: auto; padding: 1rem max(1rem, calc(50vw - 24rem)); }
.turn { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem .9rem; margin: .5rem 0;
  border-radius: .8rem; background: var(--soft); max-width: 85%; width: fit-content; }
.turn.user { background: var(--mine); color: var(--on); margin-left: auto; }
.turn.bad { color: var(--bad); border: 1px solid var(--bad); }
form { border-top: 1px solid var(--line); display: flex; gap: .6rem; align-items: flex-end; }
textarea { flex: 1; resize: none; }
textarea, input, button { font: inherit; padding: .45rem .6rem; border: 1px solid var(--line);
  border-radius: .5rem; background: var(--back); color: inherit; }
button { background: var(--mine); color: var(--on); border: 0; min-width: 5rem; }
label { font-size: .85rem; } label input { width: 5.2rem; }
</style>
<header><b id="name">...</b>
<label>temperature <input id="temperature" type="number" min="0" max="2" step="0.1" value="0.7">
</label>
<label>tokens <input id="tokens" type="number" min="1" value="256"></label>
<label>key <input id="key" type="password" autocomplete="off"></label>
<button id="fresh" type="button">New</button></header>
<main id="talk" aria-live="polite"></main>
<form id="form"><textarea id="say" rows="2" placeholder="Say something" autofocus></textarea>
<button id="send">Send</button></form>
<script>
const $ = id => document.getElementById(id);
let messages = [], stop = null;
const headers = () => ({'Content-Type': 'application/json',
  ...($('key').value ? {Authorization: 'Bearer ' + $('key').value} : {})});
fetch('health').then(r => r.json()).then(f => { $('name').textContent = f.model; });
function show(kind, text) {
  const turn = document.createElement('div');
  turn.className = 'turn ' + kind; turn.textContent = text;
  $('talk').append(turn); $('talk').scrollTop = $('talk').scrollHeight;
  return turn;
}
async function ask() {
  const turn = show('assistant', ''), before = messages.length;
  stop = new AbortController(); $('send').textContent = 'Stop';
  let text = '';
  try {
    const answer = await fetch('v1/chat/completions', {method: 'POST', signal: stop.signal,
      headers: headers(), body: JSON.stringify({messages, stream: true,
        temperature: Number($('temperature').value), max_tokens: Number($('tokens').value)})});
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = '';;) {
      const {value, done} = await reader.read();
      if (done) break;
      const parts = (rest + value).split('\\n\\n');
      rest = parts.pop();
      for (const part of parts) {
        if (part === 'data: [DONE]') continue;
        const piece = JSON.parse(part.slice(6));
        if (piece.error) throw new Error(piece.error.message);
        text += piece.choices[0].delta.content || '';
        turn.textContent = text; $('talk').scrollTop = $('talk').scrollHeight;
      }
    }
    if (!text) turn.textContent = '(an empty answer)';
  } catch (error) {
    if (error.name !== 'AbortError') {
      turn.className = 'turn bad'; turn.textContent = error.message;
    }
    if (!text) { messages = messages.slice(0, before - 1); return; }
  } finally { stop = null; $('send').textContent = 'Send'; }
  messages.push({role: 'assistant', content: text});
}
$('form').onsubmit = event => {
  event.preventDefault();
  if (stop) { stop.abort(); return; }
  const text = $('say').value.trim();
  if (!text) return;
  $('say').value = ''; messages.push({role: 'user', content: text}); show('user', text); ask();
};
$('say').onkeydown = event => {
  if (event.key !== 'Enter' || event.shiftKey) return;
  event.preventDefault(); $('form').requestSubmit();
};
$('fresh').onclick = () => { if (stop) stop.abort(); messages = []; $('talk').replaceChildren(); };
</script>
</html>
"""
